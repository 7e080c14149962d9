"""Render `$$...$$` as MathML at build time, so that equations need no script from another host."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

EQUATION = re.compile(r"^\$\$(.+?)\$\$$", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with each displayed equation as a MathML element."""
    return EQUATION.sub(render, markdown)


def render(match: re.Match[str]) -> str:
    """Return one equation as an HTML block on a line of its own."""
    formula = " ".join(match[1].split())
    return f'<div class="equation">{convert(formula, display="block")}</div>'
