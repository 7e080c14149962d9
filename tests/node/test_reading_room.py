"""The reading room on a node: studies before, while and after they are scored, and what readers write."""

from __future__ import annotations

import dataclasses
import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from peers import MakeStudy, to_bytes
from pydicom import Dataset
from sqlalchemy import select

from vitmodel.config import NodeConfig
from vitmodel.node.audit import Audit, hash_uid
from vitmodel.node.fingerprint import package_fingerprint
from vitmodel.node.gathering import GatheringRules
from vitmodel.node.inbox import Inbox
from vitmodel.node.jobs import Queue
from vitmodel.node.models import AuditEntry, StoredReading
from vitmodel.node.pages import Site, create_app, needed_scope
from vitmodel.node.scoring import Scorer, load_model
from vitmodel.pixels.open import open_image
from vitmodel.web.keys import ApiKeys, add_key
from vitmodel.web.security import AccessPolicy

TWO_VIEWS = (("R", "CC"), ("L", "CC"))


@dataclasses.dataclass
class Desk:
    """A node without its processes: studies arrive and are scored when a test says so."""

    config: NodeConfig
    inbox: Inbox
    queue: Queue

    def receive(self, images: list[Dataset]) -> str:
        """Store a study, and return its UID."""
        for image in images:
            self.inbox.store(to_bytes(image), "TEST")
        return str(images[0].StudyInstanceUID)

    def gather(self) -> None:
        self.queue.gather(GatheringRules(), package_fingerprint(self.config), force=True)

    def score(self) -> None:
        self.gather()
        assert Scorer(self.config, self.queue, "worker").score_next()

    def client(self, keys: ApiKeys | None = None, **options: Any) -> TestClient:
        return TestClient(self.app(keys, **options), base_url="http://localhost")

    def app(self, keys: ApiKeys | None = None, **options: Any) -> Any:
        site = Site(
            inbox=self.inbox,
            queue=self.queue,
            audit=Audit(self.inbox.database),
            policy=AccessPolicy(keys=keys, scope_of=needed_scope),
            load_model=options.pop("load_model", lambda: load_model(self.config)),
            **{"fingerprint": package_fingerprint(self.config)} | options,
        )
        return create_app(site)


@pytest.fixture
def desk(run: Path, sqlite: Inbox) -> Desk:
    config = NodeConfig(
        action="run", package=run / "package", folder=sqlite.folder, device="cpu", workers=1, explain=None, dicom=()
    )
    return Desk(config, sqlite, Queue(sqlite.database))


def tile_of(client: TestClient, image: dict[str, Any]) -> np.ndarray:
    answer = client.get(f"/api/images/{image['key']}/tiles/0/0/0")
    assert answer.status_code == 200
    return np.frombuffer(answer.content, "<u2").reshape(-1, int(answer.headers["X-Width"]))


def test_a_study_is_shown_before_it_is_scored_and_with_its_scores_after(desk: Desk, make_study: MakeStudy) -> None:
    uid = desk.receive(make_study())
    client = desk.client()
    waiting = client.get(f"/api/exams/{uid}").json()
    assert waiting["status"] == "waiting"
    assert waiting["note"].startswith("gathering")
    assert waiting["methods"] == {}
    assert [(image["side"], image["view"]) for image in waiting["images"]] == [
        ("R", "CC"), ("L", "CC"), ("R", "MLO"), ("L", "MLO"),
    ]  # fmt: skip
    assert {breast["probability"] for breast in waiting["breasts"]} == {None}
    source = open_image(next((desk.config.folder / "inbox" / uid).glob(f"{waiting['images'][0]['image_id']}.dcm")))
    expected = np.rint(source.to_grey(source.read_stored()) * np.float32(65535)).astype(np.uint16)[:512, :512]
    np.testing.assert_array_equal(tile_of(client, waiting["images"][0]), expected)
    assert ">waiting</span>" in client.get("/worklist").text

    desk.score()
    scored = client.get(f"/api/exams/{uid}").json()
    assert scored["status"] in ("ok", "warned")
    assert scored["note"] == ""
    (job,) = client.get(f"/studies/{uid}").json()["jobs"]
    expected_scores = {breast["laterality"]: breast["probability"] for breast in job["breasts"]}
    shown = {breast["side"]: breast["probability"] for breast in scored["breasts"]}
    assert shown == pytest.approx(expected_scores, abs=1e-6)
    np.testing.assert_array_equal(tile_of(client, scored["images"][0]), expected)
    page = client.get("/worklist?stage=kept").text
    assert all(f"{100 * probability:.1f} %" in page for probability in shown.values())
    limits = [limit for breast in scored["breasts"] for limit in breast["interval"]]
    assert all(f"{100 * limit:.1f}" in page for limit in limits), "the worklist lacks the calibration intervals"
    assert "just now" in page
    assert client.get("/worklist?stage=dead").text.count("<tbody>") == 0


def test_the_worklist_has_the_views_of_a_study_that_waits(desk: Desk, make_study: MakeStudy) -> None:
    desk.receive(make_study(TWO_VIEWS))
    assert "R\u2011CC L\u2011CC" in desk.client().get("/worklist").text


def test_a_study_that_is_refused_does_not_wait(desk: Desk, make_study: MakeStudy) -> None:
    images = make_study(TWO_VIEWS)
    images[1].PatientID = "another"
    uid = desk.receive(images)
    client = desk.client()
    assert client.get(f"/api/exams/{uid}").json()["status"] == "waiting"
    desk.gather()
    exam = client.get(f"/api/exams/{uid}").json()
    assert exam["status"] == "refused"
    assert {image["status"] for image in exam["images"]} == {"refused"}
    assert all("patients" in image["remark"] for image in exam["images"])
    assert {breast["probability"] for breast in exam["breasts"]} == {None}
    assert ">refused</span>" in client.get("/worklist?only=refused").text


def test_an_address_that_is_guessed_before_the_scores_does_not_hide_them(desk: Desk, make_study: MakeStudy) -> None:
    uid = desk.receive(make_study(TWO_VIEWS))
    client = desk.client()
    desk.gather()
    assert client.get("/api/images/j1-0/tiles/0/0/0").status_code == 404
    desk.score()
    assert all(image["pixels"] for image in client.get(f"/api/exams/{uid}").json()["images"])


def test_a_heat_map_is_computed_for_a_scored_study_only_with_the_model_that_scored_it(
    desk: Desk, make_study: MakeStudy
) -> None:
    uid = desk.receive(make_study(TWO_VIEWS))
    desk.score()
    client = desk.client()
    exam = client.get(f"/api/exams/{uid}").json()
    address = f"/api/images/{exam['images'][0]['key']}/heat-maps/gradient"
    end = time.monotonic() + 60
    while (answer := client.get(address)).status_code == 202:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert answer.json()["outline"]
    assert exam["model"]["threshold"] == pytest.approx(client.get(f"/studies/{uid}").json()["jobs"][0]["threshold"])

    other = desk.client(fingerprint="another")
    shown = other.get(f"/api/exams/{uid}").json()
    assert shown["methods"] == {}
    assert "another package" in shown["note"]
    assert other.get(address).status_code == 404


def test_images_of_a_version_stay_when_a_late_image_makes_a_new_one(desk: Desk, make_study: MakeStudy) -> None:
    images = make_study()
    uid = desk.receive(images[:3])
    desk.score()
    client = desk.client()
    first = client.get(f"/api/exams/{uid}").json()
    desk.receive(images[3:])
    desk.gather()
    between = client.get(f"/api/exams/{uid}").json()
    assert len(between["images"]) == 3
    assert "version 1, without later images" in between["note"]
    desk.score()
    second = client.get(f"/api/exams/{uid}").json()
    assert (len(second["images"]), second["note"]) == (4, "")
    before = tile_of(client, first["images"][0])
    same = next(image for image in second["images"] if image["image_id"] == first["images"][0]["image_id"])
    np.testing.assert_array_equal(before, tile_of(client, same))


def test_the_other_studies_of_the_patient_are_shown_and_those_of_others_are_not(
    desk: Desk, make_study: MakeStudy
) -> None:
    own, prior, stranger = (desk.receive(make_study(TWO_VIEWS, patient=name)) for name in ("P1", "P1", "P2"))
    exam = desk.client().get(f"/api/exams/{own}").json()
    assert [other["key"] for other in exam["others"]] == [prior]
    assert {exam["before"], exam["after"]} <= {prior, stranger, None}


def test_scores_stay_when_the_files_of_the_job_and_of_the_images_are_gone(desk: Desk, make_study: MakeStudy) -> None:
    uid = desk.receive(make_study(TWO_VIEWS))
    desk.score()
    before = desk.client().get(f"/api/exams/{uid}").json()
    shutil.rmtree(desk.config.folder / "inbox")
    without_images = desk.client().get(f"/api/exams/{uid}").json()
    assert all(image["pixels"] is None and image["problem"] for image in without_images["images"])
    shutil.rmtree(desk.config.folder / "jobs")
    after = desk.client().get(f"/api/exams/{uid}").json()
    probabilities = [[breast["probability"] for breast in exam["breasts"]] for exam in (before, without_images, after)]
    assert probabilities[0] == probabilities[1] == pytest.approx(probabilities[2], abs=1e-6)
    for one, other in zip(before["breasts"], after["breasts"], strict=True):
        assert one["interval"] == pytest.approx(other["interval"], abs=1e-6)


def test_studies_are_shown_without_heat_maps_when_the_package_is_gone(
    desk: Desk, make_study: MakeStudy, tmp_path: Path
) -> None:
    uid = desk.receive(make_study(TWO_VIEWS))
    desk.score()
    gone = dataclasses.replace(desk.config, package=tmp_path / "gone")
    client = desk.client(load_model=lambda: load_model(gone))
    assert client.get("/worklist").status_code == 200
    exam = client.get(f"/api/exams/{uid}").json()
    assert exam["methods"] == {}
    assert all(breast["probability"] is not None for breast in exam["breasts"])


# Readings


def body(**values: Any) -> dict[str, Any]:
    return {"id": "one", "breasts": {"R": {"birads": "4A"}, "L": {"birads": "1"}}, "note": "mass"} | values


def test_readings_are_kept_in_the_database_under_the_name_of_the_key(
    desk: Desk, make_study: MakeStudy, tmp_path: Path
) -> None:
    uid = desk.receive(make_study(TWO_VIEWS))
    desk.score()
    names = ("anna", "berta")
    keys = {name: {"Authorization": f"Bearer {add_key(tmp_path / 'keys', name, ('read',))}"} for name in names}
    client = desk.client(ApiKeys(tmp_path / "keys"))
    client.cookies.set("reader", "somebody else")
    address = f"/api/exams/{uid}/readings"
    assert client.post(address, json=body()).status_code == 401
    for _ in range(2):
        stored = client.post(address, json=body(), headers=keys["anna"])
        assert stored.status_code == 200, "a repeated request is answered like the first"
    assert client.post(address, json=body(note="none"), headers=keys["berta"]).status_code == 200
    shown = client.get(f"/api/exams/{uid}", headers=keys["berta"]).json()
    assert [(reading["reader"], reading["note"]) for reading in shown["readings"]] == [
        ("anna", "mass"),
        ("berta", "none"),
    ]
    assert "Your name" not in client.get("/worklist", headers=keys["anna"]).text
    with desk.inbox.database.read() as session:
        assert session.scalars(select(StoredReading.reader)).all() == ["anna", "berta"]
        actions = session.execute(select(AuditEntry.who, AuditEntry.action, AuditEntry.subject)).all()
    assert ("key:anna", "POST readings", hash_uid(uid)) in {tuple(row) for row in actions}
    assert client.get("/worklist?only=unread", headers=keys["anna"]).text.count("/exams/") == 0

    labels = pd.read_csv(io.StringIO(client.get("/readings.csv", headers=keys["anna"]).text), dtype=str)
    right = labels[(labels["laterality"] == "R") & (labels["reader"] == "anna")]
    assert right["birads"].tolist() == ["4A"]
    assert Path(right["path"].item()).is_file()


def test_a_reading_that_is_not_valid_is_refused_with_the_reason(desk: Desk, make_study: MakeStudy) -> None:
    uid = desk.receive(make_study(TWO_VIEWS))
    client = desk.client()
    address = f"/api/exams/{uid}/readings"
    assert "reader" in client.post(address, json=body()).json()["detail"], "nobody has given a name"
    client.cookies.set("reader", "anna")
    assert client.post(address, json=body(breasts={"R": {"birads": "9"}})).status_code == 422
    assert client.post("/api/exams/1.2.3/readings", json=body()).status_code == 404
    assert client.post(address, json=body()).status_code == 200, "a study can be read before it is scored"


@pytest.mark.browser
def test_the_page_of_a_waiting_study_shows_the_scores_once_they_are_there(
    desk: Desk, make_study: MakeStudy, serve_app: Callable[[Any], str], open_page: Callable[[], Any]
) -> None:
    uid = desk.receive(make_study())
    page = open_page()
    page.goto(f"{serve_app(desk.app())}/worklist")
    page.click("tbody a")
    page.wait_for_selector("figure[data-place]")
    assert page.locator("#breasts .score").all_inner_texts() == ["not scored yet"] * 2
    desk.score()
    page.locator("#breasts .score").filter(has_text="%").first.wait_for(timeout=20_000)
    assert all(text.endswith("%") for text in page.locator("#breasts .score").all_inner_texts())
    page.click("text=Status")
    assert page.url.endswith(f"/studies/{uid}")
