"""A package as one file: a zip whose bytes depend on the content alone."""

from __future__ import annotations

import shutil
import stat
import tempfile
import zipfile
from pathlib import Path

from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model.package import verify_package
from vitmodel.model.shared_package import HUB_FILES, check_package_files, check_shared_folder
from vitmodel.utils import atomic_path

EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of all members; a zip can state none before it."""
READABLE = (stat.S_IFREG | 0o644) << 16
"""Mode of all members: a file that everyone may read."""
UNIX = 3
"""Code of the system on which the members were made; modes have this meaning there."""
BLOCK = 1 << 20


def package_files(folder: Path) -> list[Path]:
    """Return the files of a verified package in alphabetical order, graphs exported from it included."""
    return [path for path in sorted(folder.iterdir()) if path.name not in HUB_FILES]


def pack(folder: Path, path: Path) -> None:
    """Write the package `folder` as one zip: members in alphabetical order, uncompressed, with a fixed time.

    Raises:
        UsageError: `folder` is no package, or `path` exists.
        VitmodelError: A file cannot be read or written.
    """
    if path.exists():
        raise UsageError(f"{path}: exists; delete it or choose another name")
    check_shared_folder(folder)
    verify_package(folder)
    try:
        with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for file in package_files(folder):
                member = zipfile.ZipInfo(file.name, EPOCH)
                member.external_attr = READABLE
                member.create_system = UNIX
                member.file_size = file.stat().st_size
                with file.open("rb") as source, archive.open(member, "w") as target:
                    shutil.copyfileobj(source, target, BLOCK)
    except OSError as error:
        raise VitmodelError(f"cannot pack {folder}: {error}") from error


def unpack(path: Path, folder: Path) -> None:
    """Write the package in the file `path` to the new folder `folder`, completely or not at all.

    Raises:
        UsageError: `path` is no file of a package, or `folder` exists.
        VitmodelError: The file is damaged, or holds something that does not belong into a package.
    """
    if folder.exists():
        raise UsageError(f"{folder}: exists; delete it or choose another folder")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(members, path)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True
            ) as scratch:
                new = Path(scratch) / "package"
                new.mkdir()
                for member in members:
                    with archive.open(member) as source, (new / member.filename).open("xb") as target:
                        shutil.copyfileobj(source, target, BLOCK)  # at most the size that was checked
                check_shared_folder(new)
                verify_package(new)
                new.rename(folder)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: does not exist; check the path") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:  # the last: of a newer zip version
        raise VitmodelError(
            f"{path}: is damaged or was not written by `vitmodel pack` ({error}); copy it again"
        ) from error
    except OSError as error:
        raise VitmodelError(f"cannot unpack {path}: {error}") from error


def _check_members(members: list[zipfile.ZipInfo], path: Path) -> None:
    """Raise VitmodelError for members that are links, encrypted, compressed or repeated, or do not belong there."""
    names = [member.filename for member in members]
    for member in members:
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise VitmodelError(f"{path}: {member.filename!r} is a link or a folder; ask its author for another file")
        if member.flag_bits & 1 or member.compress_type != zipfile.ZIP_STORED:
            raise VitmodelError(
                f"{path}: {member.filename!r} is compressed or encrypted, as `vitmodel pack` never writes files; "
                "ask its author for a file that it wrote"
            )
    if len({name.casefold() for name in names}) < len(names):
        raise VitmodelError(f"{path}: holds two files of one name; ask its author for another file")
    check_package_files({member.filename: member.file_size for member in members}, str(path))
