"""Types of fixtures that are functions. A module of its own, because each folder of tests may have a conftest.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

MakeOnce = Callable[[str, Callable[[Path], object]], Path]
"""Takes a folder's name and a function that fills the folder; returns the folder."""
Box = tuple[int, int, int, int]
Draw = Callable[..., Path]
"""Takes a name below the test's folder and boxes; writes a mask that is white there or, without boxes, a film."""
WriteSheet = Callable[[str, str, Sequence[Sequence[object]]], Path]
"""Takes a name below the test's folder, the name of a sheet and its rows; writes a spreadsheet."""
