"""The files of the OHIF viewer."""

from pathlib import Path

ROOT = "/viewer/"
"""Path at which a server must show the files: the viewer's scripts load others from there."""


def folder() -> Path:
    """Return the folder of the viewer's files; `index.html` asks for `app-config.js`, which the server makes."""
    return Path(__file__).parent / "app"
