"""OHIF at /viewer: what is served, under which policy, and what it shows in Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from peers import MakeStudy, StartOrthanc, free_port, send_files, start_node_process, wait_until
from pydicom import Dataset
from results import ohif

from vitmodel.node import ohif as served
from vitmodel.node.audit import Audit
from vitmodel.node.inbox import Inbox
from vitmodel.node.jobs import Queue
from vitmodel.node.models import Study
from vitmodel.node.pages import Site, create_app, needed_scope
from vitmodel.utils import NOT_A_MEDICAL_DEVICE
from vitmodel.web.keys import ApiKeys, add_key
from vitmodel.web.security import POLICY, AccessPolicy

MakeSite = Callable[..., TestClient]
PACS = "http://127.0.0.1:9/dicom-web"
VIEWS = ("RCC", "LCC", "RMLO", "LMLO")


@pytest.fixture
def viewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with files as the package vitmodel-viewer has them."""
    folder = tmp_path / "app"
    (folder / "assets").mkdir(parents=True)
    for name in ("index.html", "app.bundle.0123.js", "app.bundle.css", "codec.wasm", "assets/logo.svg"):
        (folder / name).write_text(f"content of {name}")
    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.setattr(served, "find_viewer", lambda: folder)
    return folder


@pytest.fixture
def make_site(sqlite: Inbox) -> Iterator[MakeSite]:
    clients: list[TestClient] = []

    def make(web_root: str = PACS, keys: ApiKeys | None = None) -> TestClient:
        policy = AccessPolicy(keys=keys, scope_of=needed_scope)
        database = sqlite.database
        site = Site(inbox=sqlite, queue=Queue(database), audit=Audit(database), web_root=web_root, policy=policy)
        clients.append(TestClient(create_app(site), base_url="http://localhost"))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def add_study(inbox: Inbox) -> None:
    with inbox.database.write() as session:
        session.add(Study(study_uid="1.2.3", patient_id="P1", last_arrival=1, first_arrival=1))


def test_without_the_package_the_answer_is_how_to_install_it(
    make_site: MakeSite, sqlite: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vitmodel_viewer", None)
    monkeypatch.setattr(served.importlib.util, "find_spec", lambda name: None)
    add_study(sqlite)
    client = make_site()
    for path in ("/viewer", "/viewer?StudyInstanceUIDs=1.2", "/viewer/index.html"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert "make viewer-package" in answer.json()["error"]
    for path in ("/worklist", "/studies/1.2.3", "/exams/1.2.3"):
        assert "OHIF" not in client.get(path, headers={"accept": "text/html"}).text


def test_a_package_without_its_files_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vitmodel_viewer").mkdir()
    (tmp_path / "vitmodel_viewer" / "__init__.py").write_text(
        "from pathlib import Path\ndef folder(): return Path(__file__).parent / 'app'\n"
    )
    monkeypatch.delitem(sys.modules, "vitmodel_viewer", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert served.find_viewer() is None
    (tmp_path / "vitmodel_viewer" / "app").mkdir()
    (tmp_path / "vitmodel_viewer" / "app" / "index.html").touch()
    assert served.find_viewer() == tmp_path / "vitmodel_viewer" / "app"
    monkeypatch.delitem(sys.modules, "vitmodel_viewer")


def test_without_a_pacs_the_answer_is_what_is_missing(make_site: MakeSite, sqlite: Inbox, viewer: Path) -> None:
    add_study(sqlite)
    client = make_site(web_root="")
    answer = client.get("/viewer")
    assert answer.status_code == 404
    assert "--pacs-web" in answer.json()["error"]
    assert "OHIF" not in client.get("/worklist").text


def test_every_page_of_a_study_links_to_the_viewer(make_site: MakeSite, sqlite: Inbox, viewer: Path) -> None:
    add_study(sqlite)
    client = make_site()
    address = f"/viewer?StudyInstanceUIDs=1.2.3&amp;hangingProtocolId={served.PROTOCOL}"
    for path in ("/worklist", "/studies/1.2.3", "/exams/1.2.3"):
        assert f'href="{address}"' in client.get(path, headers={"accept": "text/html"}).text


def test_only_files_of_the_viewer_are_served(make_site: MakeSite, viewer: Path) -> None:
    client = make_site()
    assert client.get("/viewer").text == client.get("/viewer/index.html").text == "content of index.html"
    assert client.get("/viewer/assets/logo.svg").text == "content of assets/logo.svg"
    assert client.get("/viewer/codec.wasm").headers["content-type"] == "application/wasm"
    for path in ("/viewer/..%2fsecret.txt", "/viewer/%2e%2e/secret.txt", "/viewer/assets", "/viewer//etc/passwd"):
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert "secret" not in answer.text


def test_only_the_viewer_has_a_wider_policy(make_site: MakeSite, viewer: Path) -> None:
    client = make_site()

    def policy(path: str) -> dict[str, str]:
        text = client.get(path).headers["content-security-policy"]
        return {name: value for name, _, value in (part.strip().partition(" ") for part in text.split(";"))}

    page = policy("/viewer")
    assert page["default-src"] == "'none'"
    assert page["script-src"] == page["connect-src"] == page["worker-src"] == "'self'"
    assert page["frame-ancestors"] == "'none'"
    worker = policy("/viewer/app.bundle.0123.js")
    assert worker["script-src"] == "'self' 'unsafe-eval'"
    assert worker["connect-src"] == "'self'"
    strict = POLICY.format(script="'self'", style="'self'")
    for path in ("/worklist", "/viewer/app-config.js", "/viewer/nothing", "/healthz"):
        assert client.get(path).headers["content-security-policy"] == strict, path


def test_the_configuration_has_the_proxy_and_the_notice(make_site: MakeSite, viewer: Path) -> None:
    answer = make_site().get("/viewer/app-config.js")
    assert answer.headers["content-type"].startswith("text/javascript")
    assert set(re.findall(r'Root: "([^"]*)"', answer.text)) == {"/dicom-web"}
    assert NOT_A_MEDICAL_DEVICE in answer.text
    assert "http" not in answer.text, "it names no other server"


@pytest.mark.parametrize(
    ("header", "place"),
    [
        ({"ImageLaterality": "R", "ViewPosition": "MLO"}, "RMLO"),
        ({"Laterality": "L", "ViewCodeSequence": [{"CodeValue": "399162004"}]}, "LCC"),
        ({"ImageLaterality": "L", "ViewPosition": "MLO", "ViewCodeSequence": {"CodeValue": "R-10242"}}, "LCC"),
        ({"ImageLaterality": "L", "ViewPosition": "CC", "PresentationIntentType": "FOR PROCESSING"}, None),
        ({"ImageLaterality": "L", "ViewPosition": "CC", "Modality": "OT"}, None),
        (
            {
                "ImageLaterality": "L",
                "ViewCodeSequence": [
                    {"CodeValue": "R-10242", "ViewModifierCodeSequence": [{"CodeValue": "399163009"}]}
                ],
            },
            None,
        ),
        ({"ViewPosition": "CC"}, "CC"),
    ],
)
def test_whole_images_for_reading_hang_by_side_and_view(header: dict[str, object], place: str | None) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed")
    script = f"""globalThis.window = {{}};
{served.viewer_config()}
let find;
const hangingProtocolService = {{ addCustomAttribute: (id, name, attribute) => {{ find = attribute; }} }};
window.config.extensions[0].preRegistration({{ servicesManager: {{ services: {{ hangingProtocolService }} }} }});
console.log(JSON.stringify(find({{ instances: [{json.dumps({"Modality": "MG"} | header)}] }}) ?? null));
"""
    answer = subprocess.run([node, "-e", script], capture_output=True, text=True, check=True).stdout
    assert json.loads(answer) == place, "only an image with side and view is one of the four"


def test_the_viewer_needs_a_key_that_may_read(make_site: MakeSite, viewer: Path, tmp_path: Path) -> None:
    keys = {scope: add_key(tmp_path / "keys.json", scope, (scope,)) for scope in ("read", "score")}
    client = make_site(keys=ApiKeys(tmp_path / "keys.json"))
    for path in ("/viewer", "/viewer/app-config.js", "/viewer/app.bundle.0123.js"):
        assert client.get(path).status_code == 401
        for scope, status in (("score", 403), ("read", 200)):
            assert client.get(path, headers={"x-api-key": keys[scope]}).status_code == status


# In Chromium, on a node that runs as a process and an Orthanc


def grey_values(image: Dataset) -> np.ndarray:
    """Return the pixels of a phantom, `(H, W)` float32, brighter = denser."""
    values = image.pixel_array.astype(np.float32)
    return values.max() - values if image.PhotometricInterpretation == "MONOCHROME1" else values


def mirrored(image: Dataset) -> Dataset:
    """Return a phantom with its chest wall at the other side."""
    image.PixelData = np.ascontiguousarray(image.pixel_array[:, ::-1]).tobytes()
    return image


def marked(image: Dataset, number: int) -> Dataset:
    """Return a phantom with as many bright bars as its number, so that the four views differ."""
    values = image.pixel_array.copy()
    for bar in range(number + 1):
        values[20 + 24 * bar : 32 + 24 * bar, values.shape[1] // 4 : -values.shape[1] // 4] = values.max()
    image.PixelData = values.tobytes()
    return image


def picture(page: Any, view: str) -> np.ndarray:
    """Return the pixels of a viewport, `(H, W)` uint8."""
    page.add_style_tag(content="[data-viewportid] *:not(canvas):not(:has(canvas)) {visibility: hidden !important}")
    data = page.locator(f'[data-viewportid="{view}"]').first.screenshot()
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)


@pytest.mark.browser
@pytest.mark.skipif(bool(ohif.installed()), reason=f"make test-browser installs {ohif.installed()}")
def test_the_four_views_hang_chest_wall_to_chest_wall(
    run: Path, start_orthanc: StartOrthanc, make_study: MakeStudy, tmp_path: Path
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
    images = {f"{image.ImageLaterality}{image.ViewPosition}": image for image in make_study()}
    flip = chest_wall(grey_values(images["LCC"])) != "left"  # one phantom is the source of all
    for number, view in enumerate(VIEWS):
        marked(images[view], number)
        if flip != view.startswith("R"):
            mirrored(images[view])
    dicom_port, port = free_port(), free_port()
    with start_orthanc() as orthanc, sync_api.sync_playwright() as playwright:
        orthanc.upload(list(images.values()))
        destination = f"dicom://{orthanc.aet}@127.0.0.1:{orthanc.dicom_port}"
        flags = ("--port", port, "--destination", destination, "--pacs-web", f"{orthanc.url}/dicom-web")
        node = start_node_process(tmp_path / "node", run / "package", dicom_port, *flags, "--roles", "receive,web")
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ohif.FLAGS)
        try:
            assert send_files(dicom_port, list(images.values()), tmp_path / "sent") == 0
            wait_until(lambda: node.query("SELECT 1 FROM studies"), what="the study")
            page = browser.new_page(viewport={"width": 2400, "height": 500})
            page.add_init_script(ohif.SHARE_SERVICES)
            problems = ohif.watch(page, f"http://localhost:{port}")
            page.goto(f"http://localhost:{port}/worklist")
            page.get_by_role("link", name="OHIF").click()
            ohif.wait_for_images(page, 4)
            page.screenshot(path=tmp_path / "viewer.png")
            notice = page.locator("#vitmodel-notice")
            assert notice.is_visible()
            assert "not a medical device" in notice.inner_text()
            shown = {view: picture(page, view) for view in VIEWS}
            places = [page.locator(f'[data-viewportid="{view}"]').first.bounding_box()["x"] for view in VIEWS]
            assert places == sorted(places), "R-CC, L-CC, R-MLO, L-MLO from the left"
            for view, pixels in shown.items():
                assert_shows(pixels, view, images)
            notice.get_by_role("link").click()
            page.wait_for_url("**/worklist")
            assert not problems
        finally:
            browser.close()
            node.kill()


def chest_wall(values: np.ndarray) -> str:
    """Return the side at which a phantom's breast touches the edge."""
    columns = np.flatnonzero((values > values.min() + 0.1 * np.ptp(values)).any(axis=0))
    return "left" if columns[0] < values.shape[1] - 1 - columns[-1] else "right"


def assert_shows(pixels: np.ndarray, view: str, images: dict[str, Dataset]) -> None:
    """Check that a viewport shows the image of its view, as high as the viewport and at the inner edge."""
    likeness = {}
    for name, image in images.items():
        values = grey_values(image)
        width = round(values.shape[1] * pixels.shape[0] / values.shape[0])
        small = cv2.resize(values, (width, pixels.shape[0]), interpolation=cv2.INTER_AREA)
        part = pixels[:, -width:] if view.startswith("R") else pixels[:, :width]
        likeness[name] = float(np.corrcoef(part.ravel(), small.ravel())[0, 1])
    assert max(likeness, key=lambda name: likeness[name]) == view, likeness
    assert likeness[view] > 0.9, likeness
