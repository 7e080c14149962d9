"""Take the viewer's files from npm into `vitmodel_viewer/app`, without those that mammograms do not need."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

VERSION = "3.12.10"
INTEGRITY = "0kuF66Mq9c9dMD++bUsTjMrJpXJwaZhz9B4uS244DawAjSkTwIYFU93pxPuRUQixaRi7QAHlF3Fe1qudBlZrmA=="
"""SHA-512 of npm's archive in base64, as in its field `dist.integrity`."""
ROOT = "/viewer/"
APP = Path(__file__).parent / "vitmodel_viewer" / "app"

LEFT_OUT = (
    "**/*.map",
    "ort",
    "dicom-microscopy-viewer",
    # OHIF's own page, settings and service worker, and scripts that only these load
    "app-config.js",
    "init-service-worker.js",
    "sw.js",
    "manifest.json",
    "oidc-client.min.js",
    "*silent-refresh*",
    "es6-shim.min.js",
    "polyfill.min.js",
    "assets",  # icons, and pictures of presets for volumes
    "google.js",
    "_headers",
    "_redirects",
    "serve.json",
    # the microscopy extension and mathjs, which contains code under the LGPL
    "1459.bundle.*",
    "1933.*",
    "5462.bundle.*",
    "5802.*",
    # modes and extensions for other images: ultrasound, PET-CT, 4D, segmentation, tests
    "1403.bundle.*",
    "1730.*",
    "2018.bundle.*",
    "4775.bundle.*",
    "6027.bundle.*",
    "6163.*",
    "7639.bundle.*",
    "85.bundle.*",
    "8583.*",
    "9927.bundle.*",
)
UNUSED = (
    'extensions.push("@ohif/extension-ultrasound-pleura-bline");\n',
    'modes.push("@ohif/mode-basic");\n',
    'modes.push("@ohif/mode-segmentation");\n',
    'modes.push("@ohif/mode-tmtv");\n',
    'modes.push("@ohif/mode-microscopy");\n',
    'modes.push("@ohif/mode-preclinical-4d");\n',
    'modes.push("@ohif/mode-ultrasound-pleura-bline");\n',
)
"""Lines of the viewer that load what is left out; the mode that remains is `viewer`."""
PUBLIC_PATH = '__webpack_require__.p = "/";'

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>OHIF Viewer</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{root}app.bundle.css">
<script src="{root}app-config.js"></script>
<script defer src="{root}{script}"></script>
</head>
<body><noscript>The viewer needs JavaScript.</noscript><div id="react-portal"></div><div id="root"></div></body>
</html>
"""
"""The viewer's page without inline scripts, which a Content-Security-Policy forbids."""


def unpack_viewer() -> None:
    """Write the viewer's files, its licence and the notices of its libraries to `APP`.

    Raises:
        RuntimeError: The archive is not the expected one, or holds code that must not be distributed.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = _download(Path(folder))
        shutil.rmtree(APP, ignore_errors=True)
        dist = package / "dist"
        for pattern in LEFT_OUT:
            for path in sorted(dist.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (script,) = dist.glob("app.bundle.*.js")
        _edit(script, dict.fromkeys(UNUSED, ""))
        for path in dist.glob("*.js"):
            if PUBLIC_PATH in path.read_text():
                _edit(path, {PUBLIC_PATH: f'__webpack_require__.p = "{ROOT}";'})
        _edit(dist / "app.bundle.css", {"url(/": f"url({ROOT}"}, exactly_once=False)
        (dist / "index.html").write_text(PAGE.format(root=ROOT, script=script.name))
        shutil.copy(package / "LICENSE", dist)
        (dist / "NOTICES.txt").write_text(_notices(dist))
        shutil.copytree(dist, APP)


def _download(folder: Path) -> Path:
    """Download npm's archive and unpack it; return its folder."""
    subprocess.run(
        ["npm", "pack", "--silent", f"@ohif/app@{VERSION}"], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    (archive,) = folder.glob("*.tgz")
    if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != INTEGRITY:
        raise RuntimeError(f"@ohif/app {VERSION} from npm is not the archive that this package was made for")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / "package"


def _edit(path: Path, changes: dict[str, str], exactly_once: bool = True) -> None:
    """Replace texts of a file, each of which it must contain."""
    text = path.read_text()
    for old, new in changes.items():
        count = text.count(old)
        if count == 0 or (exactly_once and count > 1):
            raise RuntimeError(f"{path.name} has {old!r} {count} times; was OHIF changed?")
        text = text.replace(old, new)
    path.write_text(text)


def _notices(dist: Path) -> str:
    """Return the names of the libraries in the viewer's scripts, and every comment with a licence or a copyright."""
    libraries: set[str] = set()
    comments: dict[str, str] = {}
    for path in sorted(dist.glob("*.js")):
        text = path.read_text()
        if re.search(r"SPDX-License-Identifier: .*GPL", text):
            raise RuntimeError(f"{path.name} contains code under the GPL or LGPL")
        libraries.update(re.findall(r"node_modules/((?:@[\w.-]+/)?[\w.-]+)/", text))
        for comment in re.findall(r"/\*(?:[^*]|\*(?!/)){0,4000}\*/|(?:^\s*//.*\n){1,40}", text, re.MULTILINE):
            if re.search(r"licen[sc]e|copyright", comment, re.IGNORECASE):
                lines = [line.strip(" \t/*") for line in comment.splitlines()]
                plain = "\n".join(line for line in lines if line and not line.startswith("../"))
                comments.setdefault(" ".join(plain.split()), plain)
    names = "\n".join(sorted(libraries))
    return (
        f"The viewer is OHIF {VERSION}, https://github.com/OHIF/Viewers, under the licence in the file LICENSE.\n\n"
        "The font is Inter, https://rsms.me/inter, under the SIL Open Font License 1.1.\n\n"
        f"Its scripts contain code of these npm packages:\n\n{names}\n\n"
        "Licences and copyrights that the scripts state:\n\n" + "\n\n".join(comments.values()) + "\n"
    )


if __name__ == "__main__":
    unpack_viewer()
