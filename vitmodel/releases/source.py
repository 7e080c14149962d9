"""List what the user passed as a source once, and find the images and label tables in it."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from vitmodel.archives import is_source_file, is_source_folder, member_paths, open_source, path_on_disk, path_to_text
from vitmodel.data.tables import TABLE_SUFFIXES, read_header
from vitmodel.jobs.journal import LOCK_FILE

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".jp2", ".bmp", ".pgm")
IMAGE_SUFFIXES = (".dcm", ".dicom", ".dic", ".ima", *PICTURE_SUFFIXES)
OTHER_SUFFIXES = frozenset(
    (
        *(*TABLE_SUFFIXES, ".json", ".jsonl", ".pkl", ".pickle", ".parquet", ".xml", ".yaml", ".yml", ".txt", ".md"),
        *(".html", ".htm", ".pdf", ".doc", ".docx", ".py", ".ipynb", ".log", ".zip", ".tar", ".gz", ".7z", ".rar"),
        *(".exe", ".dll", ".ini", ".inf", ".ico", ".css", ".js", ".db", ".sqlite", ".safetensors", ".pt", ".pth"),
        *(".npy", ".npz", ".h5", ".hdf5", ".nii", ".mha", ".mhd", ".raw", ".webp", ".gif", ".svg", ".mp4", ".avi"),
        *(".overlay", ".ics", ".ljpeg", ".roi", ".sha256", ".md5"),
    )
)
"""Suffixes of files that are not opened to see whether they are DICOM files."""
MAX_FIRST_LENGTH = 64
"""Greatest length in bytes of the first element of a DICOM file without a preamble."""
LABEL_SUFFIXES = (*TABLE_SUFFIXES, ".json", ".jsonl", ".pkl", ".pickle", ".parquet", ".xml", ".yaml")
"""Suffixes of files that may hold labels; a source that is read without labels names those that it passed over."""
MASK_FOLDER = re.compile(r"masks?|roi masks?|overlays?|(.*-)?(roi mask|cropped) images.*", re.IGNORECASE)
MASK_NAME = re.compile(r"(.+[_\-. ])?mask([_\-. ].*|\d*)|.+[_\-. ]overlay", re.IGNORECASE)
DERIVED_NAME = re.compile(r"(.+)[_\-. ](crop|cropped|contour|annotated|heatmap)", re.IGNORECASE)
"""Names of pictures made of another one: they are left out where the other one lies in the same folder."""
MAX_SUFFIXES = 10
"""Most suffixes that the line on files that are left out names."""
TABLE_DEPTH = 2
"""Number of folders below the source in which tables are searched."""


class Source:
    """A folder, an archive, a table or an image that the user passed, with one listing of its files.

    Args:
        root: The path that the user passed.
        with_neighbours: Whether tables are also found in the folder above `root` and in the folders next to it.
        images: Folder of the images of the user's own table; None = the table's folder.
        columns: Column of the manifest -> column of the user's own table.
    """

    def __init__(
        self,
        root: Path | str,
        with_neighbours: bool = False,
        images: Path | None = None,
        columns: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.root = Path(path_to_text(os.path.abspath(root)))
        self.with_neighbours = with_neighbours
        self.given_images = None if images is None else Path(os.path.abspath(images))
        self.columns = columns

    @property
    def image_folder(self) -> Path:
        """The folder of the images of the user's own table."""
        return self.given_images or self.folder

    @functools.cached_property
    def images_of_table(self) -> list[str]:
        """The images below `image_folder`."""
        return Source(self.given_images).images if self.given_images else self.images

    @functools.cached_property
    def is_folder(self) -> bool:
        """Whether `root` is a folder, an archive or a folder in an archive."""
        return is_source_folder(self.root)

    @functools.cached_property
    def is_file(self) -> bool:
        """Whether `root` is a table or an image, in an archive or not."""
        return is_source_file(self.root)

    @property
    def folder(self) -> Path:
        """The folder of the images: `root` itself, or the folder of `root` if it is a file."""
        return self.root if self.is_folder else self.root.parent

    @functools.cached_property
    def files(self) -> list[str]:
        """The sorted absolute paths of all regular files below `folder`, without hidden ones."""
        return sorted(iter_files(str(self.folder)))

    @functools.cached_property
    def images(self) -> list[str]:
        """The sorted absolute paths of the images below `folder`, without masks, overlays and crops of them."""
        candidates = [file for file in self.files if looks_like_image(file)]
        stems = {os.path.splitext(file)[0] for file in candidates}
        images = [file for file in candidates if not is_derived(file, str(self.folder), stems)]
        self._log_left_out(set(self.files) - set(candidates))
        if len(images) < len(candidates):
            left_out = len(candidates) - len(images)
            logger.info(
                "%s: %d masks, overlays and crops are left out, because they are no images", self.root, left_out
            )
        return images

    def _log_left_out(self, files: Collection[str]) -> None:
        """Log the number of files that are no images, by their suffixes, without tables."""
        suffixes = Counter(os.path.splitext(file)[1].lower() or "no suffix" for file in files)
        listed = [f"{count} {suffix}" for suffix, count in suffixes.most_common() if suffix not in TABLE_SUFFIXES]
        if listed:
            logger.info("%s: files that are no images are left out: %s", self.root, ", ".join(listed[:MAX_SUFFIXES]))

    @functools.cached_property
    def tables(self) -> list[Path]:
        """The CSV files and spreadsheets, those in the uppermost folders first; only `root` if it is a file."""
        if self.is_file:
            return [self.root] if self.root.suffix.lower() in TABLE_SUFFIXES else []
        depth = len(self.root.parts) + 1 + TABLE_DEPTH
        inside = [Path(file) for file in self.files if file.count(os.sep) < depth]
        outside = _neighbour_files(self.root) if self.with_neighbours else []
        by_depth = sorted(inside, key=lambda path: (len(path.parts), path)) + sorted(outside)
        return [path for path in by_depth if path.suffix.lower() in TABLE_SUFFIXES]

    def find_table(self, *names: str) -> Path | None:
        """Return the first of the tables called one of `names`, in any case; the order of `names` decides first."""
        by_name: dict[str, Path] = {}
        for path in self.tables:
            by_name.setdefault(path.name.lower(), path)
        return next((by_name[name.lower()] for name in names if name.lower() in by_name), None)

    def find_file(self, *names: str) -> Path | None:
        """Return the first file called one of `names`, in any case, at any depth or near the source."""
        wanted = {name.lower() for name in names}
        nearby = map(str, _neighbour_files(self.root)) if self.with_neighbours else ()
        found = (file for file in (*self.files, *nearby) if os.path.basename(file).lower() in wanted)
        return next(map(Path, found), None)

    def tables_with_columns(self, columns: Collection[str]) -> list[Path]:
        """Return the tables whose header has all of `columns`."""
        return [path for path in self.tables if set(columns) <= self.header(path)]

    def header(self, table: Path) -> frozenset[str]:
        """Return the column names of a table, read once."""
        if table not in self._headers:
            self._headers[table] = frozenset(read_header(table))
        return self._headers[table]

    @functools.cached_property
    def _headers(self) -> dict[Path, frozenset[str]]:
        return {}

    def files_of_labels(self) -> list[str]:
        """Return the files below `folder` that may hold labels, relative to it."""
        label_files = [file for file in self.files if _may_hold_labels(os.path.basename(file))]
        return [os.path.relpath(file, self.folder) for file in label_files]


def _may_hold_labels(name: str) -> bool:
    return name.lower().endswith(LABEL_SUFFIXES) or (name.lower().endswith(".txt") and "info" in name.lower())


def _neighbour_files(root: Path) -> list[Path]:
    """Return the files in the folder above `root` and in the folders next to it, not in their subfolders."""
    neighbours: list[Path] = []
    try:
        folders = [root.parent, *(path for path in root.parent.iterdir() if path.is_dir() and path != root)]
        for folder in folders:
            neighbours += [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    except OSError:  # a neighbour that may not be listed
        return neighbours
    return [Path(path_to_text(path)) for path in neighbours]


def iter_files(folder: str, ancestors: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield the paths of the files below `folder`, a folder or an archive, in no particular order.

    Hidden files and folders are skipped, and so are pipes and devices, which may block. A subfolder that a run wrote
    its output to is skipped, because the output folder may be inside the source. If `folder` itself is such a folder,
    it is read.

    Args:
        folder: The folder to search.
        ancestors: Real paths of the folders that contain `folder`, to detect cycles of symbolic links.
    """
    folder = path_on_disk(folder)
    if not os.path.isdir(folder):
        yield from _iter_members(folder)
        return
    real_path = os.path.realpath(folder)
    if real_path in ancestors:  # a symbolic link to a folder that contains it
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        message = "%s cannot be listed (%s), so its images are left out"
        logger.warning(message, path_to_text(folder), error.strerror)
        return
    for entry in entries:
        if is_hidden(entry.name):
            continue
        if _is(entry.is_dir):
            if os.path.exists(os.path.join(entry.path, LOCK_FILE)):
                _warn_of_results(path_to_text(os.path.abspath(entry.path)))
            else:
                yield from iter_files(entry.path, ancestors | {real_path})
        elif _is(entry.is_file) or (entry.is_symlink() and not os.path.exists(entry.path)):
            yield path_to_text(entry.path)


def _is(kind: Callable[[], bool]) -> bool:
    """Return the result of a directory entry's method; False if its status cannot be read, as of a link to itself."""
    try:
        return kind()
    except OSError:
        return False


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is left out: a hidden one, or the copies that macOS puts in zips."""
    return name.startswith(".") or name == "__MACOSX"


def _iter_members(folder: str) -> Iterator[str]:
    """Yield the same for an archive or a folder in it."""
    paths = member_paths(folder)
    results = {path.removesuffix(LOCK_FILE) for path in paths if path.endswith(f"/{LOCK_FILE}")} - {f"{folder}/"}
    for path in paths:
        parts = path[len(folder) + 1 :].split("/")
        if not any(map(is_hidden, parts)) and not any(path.startswith(prefix) for prefix in results):
            yield path
    for prefix in results:
        _warn_of_results(prefix)


def _warn_of_results(folder: str) -> None:
    logger.warning("%s is skipped, because it holds the results of a run; to read its images, pass this folder", folder)


def looks_like_image(file: str) -> bool:
    """Return whether a file has an image's suffix, or an unknown one or none and the first bytes of a DICOM file."""
    name = os.path.basename(file)
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    if suffix in OTHER_SUFFIXES or name.upper().startswith("DICOMDIR"):
        return False
    try:
        with open_source(file) as stream:
            return starts_like_dicom(stream.read(132))
    except Exception:  # noqa: BLE001 (no file may end the scan)
        # An unreadable file without a suffix stays in the table, so that it is reported as refused. A file named by
        # its UID, such as 1.2.840.1, has no suffix.
        return not suffix or suffix[1:].isdigit()


def starts_like_dicom(start: bytes) -> bool:
    """Return whether the first 132 bytes are those of a DICOM file, with its preamble (PS3.10 section 7.1) or without.

    A file without the preamble starts with an element of group 2 or 8: its tag, and then its VR, or its length if the
    VRs are implicit.
    """
    if start[128:] == b"DICM":
        return True
    if len(start) < 132 or start[:2] not in (b"\x02\0", b"\x08\0") or start[3]:
        return False
    has_vr = start[4:6].isalpha() and start[4:6].isupper()
    return has_vr or int.from_bytes(start[4:8], "little") <= MAX_FIRST_LENGTH


def is_derived(file: str, folder: str, stems: Collection[str]) -> bool:
    """Return whether a picture is a mask, an overlay or a crop of another one, by its name and its folders.

    Args:
        file: The picture.
        folder: The folder below which its folders' names count.
        stems: Paths of all pictures without their suffixes.
    """
    parents = file[len(folder) :].split(os.sep)[1:-1]
    if any(MASK_FOLDER.fullmatch(name) for name in parents):
        return True
    path = os.path.splitext(file)[0]
    stem = os.path.basename(path)
    if MASK_NAME.fullmatch(stem):
        return True
    derived = DERIVED_NAME.fullmatch(stem)
    return derived is not None and os.path.join(os.path.dirname(path), derived[1]) in stems


def is_dicom_name(file: str) -> bool:
    """Return whether an image is a DICOM file by its name: it may have any suffix except those of pictures."""
    return os.path.splitext(file)[1].lower() not in PICTURE_SUFFIXES


def dicom_last(files: Iterable[str]) -> list[str]:
    """Return the files with DICOM files last, so that in a mapping by name they win over copies as pictures."""
    return sorted(files, key=is_dicom_name)


def without_copies(files: Iterable[str]) -> list[str]:
    """Return the files without the pictures that have the name, and folder's name, of a DICOM file: copies of it."""

    def key(file: str) -> tuple[str, str]:
        return os.path.basename(os.path.dirname(file)), os.path.splitext(os.path.basename(file))[0]

    files = list(files)
    dicom = {key(file) for file in files if is_dicom_name(file)}
    return [file for file in files if is_dicom_name(file) or key(file) not in dicom]
