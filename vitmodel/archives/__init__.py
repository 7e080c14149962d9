"""Read source files in folders, and members of zip and tar archives without unpacking them.

A path below an archive names a member: `/data/release.zip/train_images/1/2.dcm` is the member `train_images/1/2.dcm` of
the file `/data/release.zip`. `open_source` and the other functions here accept such a path as well as that of a file.
The index of an archive is read once per process.
"""

from vitmodel.archives.bounds import ArchiveBounds, check_bounds
from vitmodel.archives.index import check_readable, is_archive, open_archive
from vitmodel.archives.names import path_on_disk, path_to_text
from vitmodel.archives.sources import (
    folder_names,
    is_source_file,
    is_source_folder,
    member_paths,
    open_source,
    sha256_source,
    source_exists,
    source_state,
)

__all__ = [
    "ArchiveBounds",
    "check_bounds",
    "check_readable",
    "folder_names",
    "is_archive",
    "is_source_file",
    "is_source_folder",
    "member_paths",
    "open_archive",
    "open_source",
    "path_on_disk",
    "path_to_text",
    "sha256_source",
    "source_exists",
    "source_state",
]
