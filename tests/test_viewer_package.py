"""The package vitmodel-viewer: what its build takes from npm, and that it is apart from the main package."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import re
import shutil
import subprocess
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from vitmodel.node.ohif import find_viewer

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "packages" / "vitmodel-viewer"
FILES = {
    "LICENSE": "The MIT License",
    "dist/index.html": "<script>inline</script>",
    "dist/app.bundle.01.js.map": "{}",
    "dist/ort/ort.js": "",
    "dist/dicom-microscopy-viewer/viewer.js": "",
    "dist/5462.bundle.ab.js": "// SPDX-License-Identifier: LGPL-2.1+\n",
    "dist/2851.bundle.cd.js": "/* Copyright (c) 2020 Somebody. BSD license */ load('../node_modules/@a/b/index.js')",
    "dist/app.bundle.css": "src: url(/font.woff2)",
    "dist/font.woff2": "font",
}
LEFT_OUT = ("microscopy", "tmtv", "test", "ultrasound", "4d", "dynamic-volume", "mode-segmentation", "dev-mode")
"""Parts of the names of the viewer's modules that are not for mammograms."""


@pytest.fixture
def unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module of the build, which finds an archive as npm has it."""
    spec = importlib.util.spec_from_file_location("unpack", SOURCE / "unpack.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "APP", tmp_path / "app")
    set_archive(module, monkeypatch, FILES | {"dist/app.bundle.01.js": "".join(module.UNUSED) + module.PUBLIC_PATH})
    return module


def set_archive(module: ModuleType, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    digest = base64.b64encode(hashlib.sha512(buffer.getvalue()).digest()).decode()
    monkeypatch.setattr(module, "INTEGRITY", digest)

    def pack(command: list[str], cwd: Path, **_: object) -> None:
        assert command[:2] == ["npm", "pack"]
        (cwd / "app.tgz").write_bytes(buffer.getvalue())

    monkeypatch.setattr(module.subprocess, "run", pack)


def test_what_mammograms_do_not_need_is_left_out(unpack: ModuleType) -> None:
    unpack.unpack_viewer()
    names = {str(path.relative_to(unpack.APP)) for path in unpack.APP.rglob("*") if path.is_file()}
    scripts = {"app.bundle.01.js", "2851.bundle.cd.js"}
    assert names == scripts | {"index.html", "app.bundle.css", "font.woff2", "LICENSE", "NOTICES.txt"}
    notices = (unpack.APP / "NOTICES.txt").read_text()
    assert "Copyright (c) 2020 Somebody" in notices
    assert "@a/b\n" in notices


def test_files_are_asked_for_below_viewer_and_the_page_has_no_inline_script(unpack: ModuleType) -> None:
    unpack.unpack_viewer()
    assert (unpack.APP / "app.bundle.01.js").read_text() == '__webpack_require__.p = "/viewer/";'
    assert (unpack.APP / "app.bundle.css").read_text() == "src: url(/viewer/font.woff2)"
    page = (unpack.APP / "index.html").read_text()
    assert re.findall(r'<script[^>]* src="([^"]*)"></script>', page) == [
        "/viewer/app-config.js",
        "/viewer/app.bundle.01.js",
    ]
    assert page.count("<script") == 2
    assert "<style" not in page


def test_another_archive_than_the_known_one_is_refused(unpack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "INTEGRITY", "0" * 88)
    with pytest.raises(RuntimeError, match="not the archive"):
        unpack.unpack_viewer()
    assert not unpack.APP.exists()


def test_code_under_the_lgpl_is_refused(unpack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    main = "".join(unpack.UNUSED) + unpack.PUBLIC_PATH
    moved = {"dist/7777.bundle.ab.js": FILES["dist/5462.bundle.ab.js"], "dist/app.bundle.01.js": main}
    set_archive(unpack, monkeypatch, FILES | moved)
    with pytest.raises(RuntimeError, match=r"7777\.bundle.*LGPL"):
        unpack.unpack_viewer()


def test_a_viewer_that_changed_is_refused(unpack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    set_archive(unpack, monkeypatch, FILES | {"dist/app.bundle.01.js": unpack.PUBLIC_PATH})
    with pytest.raises(RuntimeError, match="was OHIF changed"):
        unpack.unpack_viewer()


def test_the_main_package_does_not_contain_the_viewer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["packages"]["find"] == {"include": ["vitmodel*"]}
    assert {path.name for path in ROOT.glob("vitmodel*") if path.suffix != ".egg-info"} == {"vitmodel"}


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no git checkout")
def test_files_of_the_viewer_are_not_in_the_repository() -> None:
    command = ["git", "ls-files", str(SOURCE)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in listed if "/app/" in name]


@pytest.mark.browser
@pytest.mark.skipif(find_viewer() is None, reason="make test-browser installs it")
def test_every_script_that_the_mode_of_mammograms_needs_is_there() -> None:
    folder = find_viewer()
    assert folder is not None
    (main,) = folder.glob("app.bundle.*.js")
    text = main.read_text()
    branches = [
        part.partition('"') for part in text[text.index("async function loadModule") :].split('(module === "')[1:]
    ]
    needed = {name: body for name, _, body in branches if not any(word in name for word in LEFT_OUT)}
    assert "@ohif/extension-cornerstone-dicom-sr" in needed
    for name, body in needed.items():
        for chunk in re.findall(r"__webpack_require__\.e\((?:/\*.*?\*/ )?(\d+)\)", body):
            assert list(folder.glob(f"{chunk}.*")), f"{name} needs {chunk}"
