"""Archives of strangers: those that are too large are refused in no time, and so are links and clashes of names."""

from __future__ import annotations

import io
import stat
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from vitmodel.archives import ArchiveBounds, check_bounds
from vitmodel.errors import RequestRefusedError

BOUNDS = ArchiveBounds(entries=1000, depth=32, size=1_000_000, seconds=20)


def write_zip(path: Path, *names: str, content: bytes = b"", link: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content)
        if link:
            info = zipfile.ZipInfo(link)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
    return path


def write_tar(path: Path, *names: str, kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info, io.BytesIO())
    return path


def refusal(path: Path, bounds: ArchiveBounds = BOUNDS) -> tuple[int, str]:
    """Return the status and the message with which an archive is refused."""
    start = time.perf_counter()
    with pytest.raises(RequestRefusedError) as caught:
        check_bounds(path, bounds, "a.zip")
    assert time.perf_counter() - start < 5
    assert str(path) not in caught.value.message
    return caught.value.http_status, caught.value.message


def test_a_zip_and_a_tar_within_the_bounds_are_accepted(tmp_path: Path) -> None:
    names = ["a/b/1.dcm", "a/b/2.dcm", "a/3.dcm", "4.dcm"]
    check_bounds(write_zip(tmp_path / "a.zip", *names), BOUNDS, "a.zip")
    check_bounds(write_tar(tmp_path / "a.tar", *names), BOUNDS, "a.tar")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_sizes_depth_and_numbers_are_413(tmp_path: Path) -> None:
    many = [f"{number}.dcm" for number in range(30_000)]
    assert refusal(write_zip(tmp_path / "1.zip", *many)) == (
        413, "a.zip holds more than 1000 entries; send fewer images"
    )  # fmt: skip
    folders = [f"{number}/" for number in range(1500)]
    assert refusal(write_zip(tmp_path / "2.zip", *folders))[0] == 413
    assert refusal(write_tar(tmp_path / "2.tar", *folders, kind=tarfile.DIRTYPE))[0] == 413
    deep = "/".join(["f"] * 2000) + "/1.dcm"
    assert refusal(write_zip(tmp_path / "3.zip", deep)) == (
        413, "a.zip has more than 32 folders in each other; pack it with fewer"
    )  # fmt: skip
    bomb = write_zip(tmp_path / "4.zip", "1.dcm", content=bytes(1_000_001))
    status, message = refusal(bomb)
    assert (status, "is larger than 1 MB" in message) == (413, True)
    slow = ArchiveBounds(entries=1000, depth=32, size=1_000_000, seconds=-1)
    assert refusal(write_zip(tmp_path / "5.zip", "1.dcm"), slow)[0] == 413


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_links_clashes_and_long_names_are_422(tmp_path: Path) -> None:
    assert refusal(write_zip(tmp_path / "1.zip", "1.dcm", link="2.dcm"))[0] == 422
    assert refusal(write_tar(tmp_path / "1.tar", "1.dcm", kind=tarfile.SYMTYPE))[0] == 422
    status, message = refusal(write_zip(tmp_path / "2.zip", "a/1.dcm", "a//1.dcm"))
    assert (status, "a name twice" in message) == (422, True)
    status, message = refusal(write_zip(tmp_path / "3.zip", "a", "a/1.dcm"))
    assert (status, "of a file and of a folder" in message) == (422, True)
    status, message = refusal(write_zip(tmp_path / "4.zip", "x" * 300 + ".dcm"))
    assert (status, "more than 255 bytes" in message) == (422, True)
