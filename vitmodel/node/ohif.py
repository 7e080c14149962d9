"""The OHIF viewer at /viewer, from the optional package vitmodel-viewer, on the DICOMweb that the node passes on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

from vitmodel.errors import RequestRefusedError
from vitmodel.pixels.header_meaning import PARTIAL_MODIFIERS
from vitmodel.pixels.side_and_view import VIEW_OF_CODE
from vitmodel.viewer.pages import make_environment

TEMPLATES = Path(__file__).parent / "templates"
PROTOCOL = "vitmodelFourViews"
"""Name of the hanging protocol in the viewer's configuration."""
INSTALL = (
    "the OHIF viewer is not installed; run `make viewer-package` in a checkout of vitmodel and "
    "`pip install dist/vitmodel_viewer-*.whl`, and start the node again"
)
NO_PACS = "the OHIF viewer needs the DICOMweb of the PACS; start the node with --pacs-web"
YEAR = 365 * 86400


def find_viewer() -> Path | None:
    """Return the folder of the viewer's files; None = the package vitmodel-viewer is not installed or was not built."""
    if importlib.util.find_spec("vitmodel_viewer") is None:
        return None
    import vitmodel_viewer

    folder = Path(vitmodel_viewer.folder())
    return folder if (folder / "index.html").is_file() else None


def content_policy(name: str) -> str:
    """Return the Content-Security-Policy of a file of the viewer.

    The page runs no code from texts, but its scripts write styles into it. A script's own policy counts only where it
    starts a worker: the one that decodes JPEG 2000 and JPEG-LS makes functions from texts.

    Args:
        name: Name of the file; that of the page is `index.html`.
    """
    if name.endswith(".js"):
        return "default-src 'none'; script-src 'self' 'unsafe-eval'; connect-src 'self'"
    return (
        "default-src 'none'; script-src 'self'; worker-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
        "style-src 'self' 'unsafe-inline'; font-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


def make_viewer_link(has_pacs: bool) -> Callable[[str], str]:
    """Return a function from a study's UID to its address in the viewer, or to an empty text if there is no viewer."""
    if not has_pacs or find_viewer() is None:
        return lambda study_uid: ""
    return lambda study_uid: "/viewer?" + urlencode({"StudyInstanceUIDs": study_uid, "hangingProtocolId": PROTOCOL})


def viewer_config() -> str:
    """Return the viewer's configuration, a script: one DICOMweb source, the four views and the notice."""
    template = make_environment(TEMPLATES).get_template("ohif-config.js.j2")
    tables = {"view_of_code": VIEW_OF_CODE, "partial_modifiers": PARTIAL_MODIFIERS}
    return str(template.render(root="/dicom-web", protocol=PROTOCOL, **tables))


def make_viewer_router(has_pacs: bool) -> APIRouter:
    """Return the routes of the viewer; without the package or a PACS, they answer with what is missing.

    Args:
        has_pacs: Whether `/dicom-web` is served.
    """
    router = APIRouter(include_in_schema=False)
    folder = find_viewer()
    found = [path for path in folder.rglob("*") if path.is_file()] if folder else []
    files = {str(path.relative_to(folder)): path for path in found} if folder else {}

    @router.get("/viewer/app-config.js", response_model=None)
    def send_config() -> Response:
        headers = {"Cache-Control": "no-cache"}
        return Response(viewer_config(), media_type="text/javascript", headers=headers)

    @router.get("/viewer", response_model=None)
    @router.get("/viewer/{name:path}", response_model=None)
    def send_file(name: str = "index.html") -> FileResponse:
        if not files or not has_pacs:
            raise RequestRefusedError(404, NO_PACS if files else INSTALL)
        if name not in files:
            raise RequestRefusedError(404, "the viewer has no such file")
        hashed = ".bundle." in name and name.endswith(".js")
        cache = f"private, max-age={YEAR}, immutable" if hashed else "no-cache"
        return FileResponse(
            files[name], headers={"Content-Security-Policy": content_policy(name), "Cache-Control": cache}
        )

    return router
