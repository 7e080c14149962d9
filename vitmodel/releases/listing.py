"""List the files below a folder or in an archive once, and separate images from other files."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

from vitmodel.archives import member_paths, open_source, path_on_disk, path_to_text
from vitmodel.data.tables import TABLE_SUFFIXES
from vitmodel.jobs.journal import LOCK_FILE
from vitmodel.pixels.dicom_reading import starts_like_dicom

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".jp2", ".bmp", ".pgm")
IMAGE_SUFFIXES = (".dcm", ".dicom", ".dic", ".ima", *PICTURE_SUFFIXES)
LABEL_SUFFIXES = (*TABLE_SUFFIXES, ".json", ".jsonl", ".pkl", ".pickle", ".parquet", ".xml", ".yaml", ".yml")
"""Suffixes of files that may hold labels; a source that is read without labels names those that it passed over."""
OTHER_SUFFIXES = frozenset(
    (
        *(*LABEL_SUFFIXES, ".txt", ".md"),
        *(".html", ".htm", ".pdf", ".doc", ".docx", ".py", ".ipynb", ".log", ".zip", ".tar", ".gz", ".7z", ".rar"),
        *(".exe", ".dll", ".ini", ".inf", ".ico", ".css", ".js", ".db", ".sqlite", ".safetensors", ".pt", ".pth"),
        *(".npy", ".npz", ".h5", ".hdf5", ".nii", ".mha", ".mhd", ".raw", ".webp", ".gif", ".svg", ".mp4", ".avi"),
        *(".overlay", ".ics", ".ljpeg", ".roi", ".sha256", ".md5"),
    )
)
"""Suffixes of files that are not opened to see whether they are DICOM files."""
MASK_FOLDER = re.compile(r"masks?|roi masks?|overlays?|(.*-)?(roi mask|cropped) images.*", re.IGNORECASE)
MASK_NAME = re.compile(r"(.+[_\-. ])?mask([_\-. ].*|\d*)|.+[_\-. ]overlay", re.IGNORECASE)
DERIVED_NAME = re.compile(r"(.+)[_\-. ](crop|cropped|contour|annotated|heatmap)", re.IGNORECASE)
"""Names of pictures made of another one: they are left out where the other one lies in the same folder."""
MAX_SUFFIXES = 10
"""Most suffixes that the line on files that are left out names."""


class Listing:
    """The files below a folder or in an archive, each property read once.

    Args:
        folder: The folder or archive.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @functools.cached_property
    def files(self) -> list[str]:
        """The sorted absolute paths of all regular files below `folder`, without hidden ones."""
        return sorted(iter_files(self.folder))

    @functools.cached_property
    def images(self) -> list[str]:
        """The sorted absolute paths of the images below `folder`, without masks, overlays and crops of them."""
        candidates = [file for file in self.files if looks_like_image(file)]
        stems = {os.path.splitext(file)[0] for file in candidates}
        images = [file for file in candidates if not is_derived(file, self.folder, stems)]
        self._log_left_out(set(self.files) - set(candidates))
        if len(images) < len(candidates):
            left_out = len(candidates) - len(images)
            logger.info(
                "%s: %d masks, overlays and crops are left out, because they are no images", self.folder, left_out
            )
        return images

    def _log_left_out(self, files: Collection[str]) -> None:
        """Log the number of files that are no images, by their suffixes, without tables."""
        suffixes = Counter(os.path.splitext(file)[1].lower() or "no suffix" for file in files)
        listed = [f"{count} {suffix}" for suffix, count in suffixes.most_common() if suffix not in TABLE_SUFFIXES]
        if listed:
            logger.info("%s: files that are no images are left out: %s", self.folder, ", ".join(listed[:MAX_SUFFIXES]))


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
    special = []
    for entry in entries:
        if is_hidden(entry.name):
            continue
        if is_kind(entry.is_dir):
            if os.path.exists(os.path.join(entry.path, LOCK_FILE)):
                _warn_of_results(path_to_text(os.path.abspath(entry.path)))
            else:
                yield from iter_files(entry.path, ancestors | {real_path})
        elif is_kind(entry.is_file) or (entry.is_symlink() and not os.path.exists(entry.path)):
            yield path_to_text(entry.path)
        else:
            special.append(path_to_text(entry.name))
    if special:
        message = "%s: pipes, sockets and devices are left out: %s"
        logger.warning(message, path_to_text(folder), ", ".join(sorted(special)[:MAX_SUFFIXES]))


def is_kind(kind: Callable[[], bool]) -> bool:
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
