"""Archives: members are read in place, at any position, and hostile or damaged archives are refused or named."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vitmodel import archives
from vitmodel.archives import (
    check_readable,
    is_archive,
    is_source_file,
    is_source_folder,
    member_paths,
    members,
    open_archive,
    open_source,
    sha256_source,
    source_exists,
    source_state,
)
from vitmodel.errors import ImageRefusedError, InputRefusedError

CONTENTS = {f"top/{size}/image.dcm": random.Random(size).randbytes(size) + bytes(9000) for size in (0, 20_000, 60_000)}
METHODS = {
    "stored.zip": zipfile.ZIP_STORED,
    "deflated.zip": zipfile.ZIP_DEFLATED,
    "bzip2.zip": zipfile.ZIP_BZIP2,
    "lzma.zip": zipfile.ZIP_LZMA,
}


def write_zip(path: Path, contents: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, contents: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w:", format=format) as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_archive(folder: Path, kind: str) -> Path:
    """Return an archive with `CONTENTS`: one of `METHODS`, or a tar in one of the formats of tarfile."""
    if kind in METHODS:
        return write_zip(folder / kind, CONTENTS, METHODS[kind])
    return write_tar(folder / kind, CONTENTS, {"pax.tar": tarfile.PAX_FORMAT, "gnu.tar": tarfile.GNU_FORMAT}[kind])


@pytest.mark.parametrize("kind", [*METHODS, "pax.tar", "gnu.tar"])
def test_members_have_the_bytes_and_hashes_of_their_files(kind: str, tmp_path: Path) -> None:
    archive = write_archive(tmp_path, kind)
    assert is_archive(archive)
    paths = member_paths(archive)
    assert paths == [f"{archive}/{name}" for name in CONTENTS]
    for path, content in zip(paths, CONTENTS.values(), strict=True):
        with open_source(path) as file:
            assert file.read() == content
        assert sha256_source(path) == hashlib.sha256(content).hexdigest()
        assert is_source_file(path)
        assert not is_source_folder(path)
    assert member_paths(archive / "top" / "20000") == [f"{archive}/top/20000/image.dcm"]
    for folder in (archive, archive / "top", archive / "top" / "20000"):
        assert is_source_folder(folder)
        assert not is_source_file(folder)
    for missing in (archive / "to", archive / "top" / "image.dcm", tmp_path / "other.zip" / "a"):
        assert not source_exists(missing)
        assert source_state(missing) == "missing"
        with pytest.raises(FileNotFoundError):
            open_source(missing)


@pytest.mark.parametrize("kind", [*METHODS, "pax.tar"])
def test_a_member_is_read_at_any_position_like_a_file(kind: str, tmp_path: Path) -> None:
    content = CONTENTS["top/60000/image.dcm"]
    path = write_archive(tmp_path, kind) / "top/60000/image.dcm"
    draws = random.Random(0)
    with open_source(path) as member, io.BytesIO(content) as expected:
        for _ in range(50):
            whence = draws.choice((os.SEEK_SET, os.SEEK_CUR, os.SEEK_END))
            origin = {os.SEEK_SET: 0, os.SEEK_CUR: expected.tell(), os.SEEK_END: len(content)}[whence]
            target, size = draws.randrange(len(content) + 10), draws.randrange(5000)
            assert member.seek(target - origin, whence) == expected.seek(target - origin, whence) == target
            assert member.read(size) == expected.read(size)


@pytest.mark.parametrize("kind", ["deflated.zip", "pax.tar"])
def test_many_threads_read_one_archive_at_once(kind: str, tmp_path: Path) -> None:
    archive = write_archive(tmp_path, kind)
    names = list(CONTENTS) * 20
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(lambda name: sha256_source(archive / name), names))
    assert digests == [hashlib.sha256(CONTENTS[name]).hexdigest() for name in names]


def test_reading_the_start_of_a_member_unpacks_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_zip(tmp_path / "a.zip", {"zeros": bytes(5_000_000)}, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(members, "MAX_MEMBER_BYTES", 1_000_000)
    with open_source(archive / "zeros") as file:
        assert file.read(132) == bytes(132)
        with pytest.raises(ImageRefusedError, match="more than 0 MiB unpacked") as caught:
            file.read()
    assert caught.value.code == "too_large"


def test_the_state_of_a_member_changes_with_its_content_alone(tmp_path: Path) -> None:
    states = []
    for content in (b"one", b"two", b"one"):
        archive = write_zip(tmp_path / "a.zip", {"member": content, "other": b"x"})
        os.utime(archive, ns=(len(states), len(states)))  # another archive, even within the resolution of the clock
        states.append([source_state(archive / name) for name in ("member", "other")])
    assert states[0] == states[2] != states[1]
    assert states[0][1] == states[1][1]


def damage(path: Path, content: bytes) -> None:
    """Change one byte of a member that is stored as it is."""
    raw = bytearray(path.read_bytes())
    raw[raw.index(content) + len(content) // 2] ^= 1
    path.write_bytes(raw)


def test_a_wrong_checksum_concerns_its_member_only(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"good": b"good content", "bad": b"bad content", "last": b"last content"})
    damage(archive, b"bad content")
    assert [open_source(archive / name).read() for name in ("good", "last")] == [b"good content", b"last content"]
    for _ in range(2):
        with pytest.raises(ImageRefusedError, match=r"a.zip/bad is damaged in its archive \(Bad CRC-32"):
            open_source(archive / "bad").read()


@pytest.mark.parametrize("cut", [1, 40, 400])
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_a_truncated_archive_is_refused(write: object, cut: int, tmp_path: Path) -> None:
    archive = write(tmp_path / "a.zip", {"a": b"a" * 20_000, "b": b"b" * 20_000})  # type: ignore[operator]
    content = archive.read_bytes().rstrip(b"\0") if write is write_tar else archive.read_bytes()
    archive.write_bytes(content[:-cut])
    assert is_archive(archive)
    with pytest.raises(InputRefusedError, match=r"a.zip cannot be read as a (zip|tar): .*copy it again"):
        open_archive(archive)
    assert source_state(archive / "a") == "missing"
    with pytest.raises(ImageRefusedError, match="cannot be read as a"):
        open_source(archive / "a")


def test_a_damaged_header_within_a_tar_loses_no_members_in_silence(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", {"a": b"a" * 600, "b": b"b", "c": b"c"})
    raw = bytearray(archive.read_bytes())
    raw[512 + 1024 + 5] ^= 1  # in the header of b
    archive.write_bytes(raw)
    with pytest.raises(InputRefusedError, match="the header at byte 1536 is damaged"):
        open_archive(archive)


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"a": b"content"})
    raw = bytearray(archive.read_bytes())
    raw[raw.rindex(b"PK\1\2") + 8] |= 1  # the flag of the central directory (APPNOTE 4.4.4)
    archive.write_bytes(raw)
    with pytest.raises(InputRefusedError, match="encrypted; unpack it"):
        open_archive(archive)


def test_an_unsupported_compression_refuses_the_member(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"a": b"content"})
    raw = bytearray(archive.read_bytes())
    raw[raw.rindex(b"PK\1\2") + 10] = 9  # deflate64 (APPNOTE 4.4.5)
    archive.write_bytes(raw)
    with pytest.raises(ImageRefusedError, match="damaged in its archive"):
        open_source(archive / "a").read()


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_that_lead_out_of_the_archive_are_left_out_and_named(write: object, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    contents = {"../secret": b"a", "a/../../secret": b"b", "/etc/passwd": b"c", "./x//y": b"d", "..": b"e"}
    archive = write(tmp_path / "a.zip", contents)  # type: ignore[operator]
    assert member_paths(archive) == [f"{archive}/etc/passwd", f"{archive}/x/y"]  # as unpacking would name them
    assert open_source(archive / "etc/passwd").read() == b"c"
    with pytest.raises(FileNotFoundError):
        open_source(f"{archive}/../secret")
    (note,) = open_archive(archive).notes
    assert note == "3 members have names that lead out of the archive and are left out, such as '../secret'"


def test_links_repeated_names_and_nested_archives_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:") as archive:
        for name, content in (("a", b"old"), ("a", b"new"), ("b.zip", b"PK")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert open_source(path / "a").read() == b"new"
    assert not source_exists(path / "link")
    links, repeated, nested = open_archive(path).notes
    assert "1 links and sparse files are left out" in links
    assert "1 names occur again" in repeated
    assert "such as 'b.zip'" in nested


def test_a_link_in_a_zip_is_left_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    assert member_paths(tmp_path / "a.zip") == []
    assert "1 links and sparse" in open_archive(tmp_path / "a.zip").notes[0]


def test_a_zip64_member_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, archive.open("a", "w", force_zip64=True) as file:
        file.write(b"content")
    assert open_source(tmp_path / "a.zip" / "a").read() == b"content"


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused_with_a_way_out(mode: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.tar.{mode[2:]}"
    with tarfile.open(path, mode):  # type: ignore[call-overload]
        pass
    assert not is_archive(path)
    with pytest.raises(InputRefusedError, match=r"compressed as a whole .* unpack it and pass the folder"):
        check_readable(path)


def test_spreadsheets_and_other_files_are_no_archives(tmp_path: Path) -> None:
    write_zip(tmp_path / "table.xlsx", {"[Content_Types].xml": b""})
    (tmp_path / "text.zip").write_text("no zip")
    for name in ("table.xlsx", "text.zip", "missing.zip"):
        assert not is_archive(tmp_path / name)
        check_readable(tmp_path / name)


def test_adapters_and_decoders_reach_sources_through_the_archives() -> None:
    """A direct call would work for files in folders and fail for members of archives."""
    package = Path(archives.__file__).parents[1]
    direct = re.compile(
        r"(?<![\w.])open\(|\.open\(|\.read_(bytes|text)\(|\.is_(file|dir)\(\)|\.exists\(\)|\.iterdir\(|scandir\("
        r"|cv2\.im(read|count)\("
    )
    allowed = {"source.py", "listing.py", "openjpeg.py"}  # lists folders; finds a library
    for part in ("releases", "pixels", "data/tables.py", "data/cropping.py"):
        paths = [package / part] if part.endswith(".py") else (package / part).glob("*.py")
        for path in sorted(paths):
            calls = [line for line in path.read_text().splitlines() if direct.search(line)]
            assert path.name in allowed or not calls, path
