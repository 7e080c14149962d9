"""A source that the user passed: its images and the label tables in it."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

from vitmodel.archives import is_source_file, is_source_folder, path_on_disk, path_to_text
from vitmodel.data.tables import TABLE_SUFFIXES, read_header
from vitmodel.releases.listing import LABEL_SUFFIXES, Listing, is_kind

TABLE_DEPTH = 2
"""Number of folders below the source in which tables are searched."""


class Source:
    """A folder, an archive, a table or an image that the user passed, with one listing of its files.

    Args:
        root: The path that the user passed.
        with_neighbours: Whether tables are also found in the folder above `root` and in the folders next to it.
        images: Folder of the images of the user's own table; None = the table's folder.
        columns: Column of the manifest -> column of the user's own table.
        listing: The files below `folder`; None = they are listed when they are needed.
    """

    def __init__(
        self,
        root: Path | str,
        with_neighbours: bool = False,
        images: Path | None = None,
        columns: Mapping[str, str] = MappingProxyType({}),
        listing: Listing | None = None,
    ) -> None:
        self.root = Path(path_to_text(os.path.abspath(root)))
        self.with_neighbours = with_neighbours
        self.given_images = None if images is None else Path(os.path.abspath(images))
        self.columns = columns
        self._given_listing = listing

    def near(self) -> Source:
        """Return the same source, listed once, with the tables in the folders around it."""
        return Source(self.root, True, self.given_images, self.columns, self._listing)

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
    def _listing(self) -> Listing:
        return self._given_listing or Listing(str(self.folder))

    @property
    def files(self) -> list[str]:
        """The sorted absolute paths of all regular files below `folder`, without hidden ones."""
        return self._listing.files

    @property
    def images(self) -> list[str]:
        """The sorted absolute paths of the images below `folder`, without masks, overlays and crops of them."""
        return self._listing.images

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
    """Return the files in the folder above `root` and in the folders next to it, not in their subfolders.

    A folder that may not be listed has none.
    """
    folders = [root.parent, *(Path(entry.path) for entry in _entries(root.parent) if is_kind(entry.is_dir))]
    return [
        Path(path_to_text(entry.path))
        for folder in folders
        if folder != root
        for entry in _entries(folder)
        if is_kind(entry.is_file) and not entry.name.startswith(".")
    ]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(path_on_disk(str(folder))))
    except OSError:
        return []
