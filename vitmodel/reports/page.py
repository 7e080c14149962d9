"""Rendering of the HTML templates, which share one frame and one warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitmodel.utils import NOT_A_MEDICAL_DEVICE

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, **values: Any) -> str:
    """Return an HTML page.

    Args:
        template: Name of a file in `reports/templates`, such as "etl.html.j2".
        values: The template's variables; text in them is escaped.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(warning=NOT_A_MEDICAL_DEVICE, **values)
