"""Readings over HTTP: stored, exported as labels, hidden scores in a blinded reading, other exams and other models."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
import pytest
from fastapi.testclient import TestClient

from vitmodel.cli import main
from vitmodel.commands.view import create_app
from vitmodel.config import ViewConfig
from vitmodel.data.manifest import read_manifest
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.releases.inputs import read_inputs
from vitmodel.viewer.exams import Exam
from vitmodel.viewer.readings import ReadingStore
from vitmodel.viewer.room import describe_age
from vitmodel.viewer.scores_folder import read_scores_folder

Open = Callable[..., TestClient]


@pytest.fixture(scope="module")
def scores(run: Path, release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("readings") / "scores"
    assert main(["predict", str(run / "package"), str(release), str(out)]) == 1
    return out


@pytest.fixture
def folder(scores: Path, tmp_path: Path) -> Path:
    """Return a copy of the scores, to which a test may write."""
    return Path(shutil.copytree(scores, tmp_path / "scores"))


@pytest.fixture
def open_room(folder: Path) -> Iterator[Open]:
    clients = []

    def open_room(**options: Any) -> TestClient:
        app = create_app(ViewConfig(**{"scores": folder, **options}))
        clients.append(TestClient(app, base_url="http://localhost"))
        return clients[-1]

    yield open_room
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def exam(scores: Path) -> Exam:
    """Return an exam of both breasts without refused images."""
    return next(exam for exam in read_scores_folder(scores) if exam.status == "ok" and len(exam.breasts) == 2)


def reading(exam: Exam, right: str = "2", left: str = "4B", **values: Any) -> dict[str, Any]:
    return {"id": "one", "breasts": {"R": {"birads": right}, "L": {"birads": left}}, "note": "", "boxes": []} | values


def box_on(exam: Exam, side: str) -> dict[str, Any]:
    image = next(image for image in exam.images if image.side == side)
    return {"image": image.key, "box": [10.04, 20, 40.5, 60]}


def test_a_reading_is_kept_with_its_reader_and_time(open_room: Open, folder: Path, exam: Exam) -> None:
    client = open_room(reader="Dr. Ann Ä")
    now = datetime.datetime.now().astimezone()
    assert not (folder / "readings.jsonl").exists(), "nothing is written before the first reading"
    body = reading(exam, note=" a <b>mass</b> ", boxes=[box_on(exam, "L")], seconds=12.34, active_seconds=10)
    body["breasts"]["L"]["agrees"] = False
    assert client.post(f"/api/exams/{exam.key}/readings", json=body).status_code == 200
    (line,) = (folder / "readings.jsonl").read_text().splitlines()
    stored = json.loads(line)
    assert stored["reader"] == "Dr. Ann Ä"
    assert stored["breasts"]["L"] == {"birads": "4B", "agrees": False}
    assert stored["note"] == "a <b>mass</b>"
    assert stored["boxes"][0]["box"] == [10.0, 20.0, 40.5, 60.0]
    assert abs(datetime.datetime.fromisoformat(stored["stored"]) - now) < datetime.timedelta(seconds=30)
    again = open_room(reader="Bo")
    (shown,) = again.get(f"/api/exams/{exam.key}").json()["readings"]
    assert (shown["reader"], shown["seconds"], shown["active_seconds"]) == ("Dr. Ann Ä", 12.3, 10)
    assert shown["boxes"][0]["image"] == box_on(exam, "L")["image"]


def test_a_reading_that_is_sent_twice_is_kept_once_and_a_correction_is_added(
    open_room: Open, folder: Path, exam: Exam
) -> None:
    client = open_room(reader="Ann")
    address = f"/api/exams/{exam.key}/readings"
    for body in (reading(exam), reading(exam), reading(exam, left="5", id="two")):
        assert client.post(address, json=body).status_code == 200
    assert len((folder / "readings.jsonl").read_text().splitlines()) == 2


def test_a_line_that_was_cut_short_is_ignored_and_the_next_one_is_whole(
    open_room: Open, folder: Path, exam: Exam
) -> None:
    address = f"/api/exams/{exam.key}/readings"
    open_room(reader="Ann").post(address, json=reading(exam))
    with (folder / "readings.jsonl").open("a") as file:
        file.write('{"key": "cut')
    assert open_room(reader="Ann").post(address, json=reading(exam, id="two")).status_code == 200
    assert [entry.id for entry in ReadingStore(folder / "readings.jsonl").all()] == ["one", "two"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"breasts": {"R": {"birads": "7"}}}, "birads: '7' is none of"),
        ({"breasts": {"X": {"birads": "1"}}}, "no breast 'X'"),
        ({"breasts": {"R": {"birads": "1", "agrees": "yes"}}}, "agrees: must be"),
        ({"breasts": [], "note": ""}, "the reading is empty"),
        ({"note": "x" * 5001}, "at most 5000"),
        ({"boxes": [{"image": "unknown", "box": [0, 0, 1, 1]}]}, "key of an image"),
        ({"seconds": -1}, "seconds: must lie"),
        ({"id": ""}, "id: must be"),
    ],
)
def test_a_reading_that_makes_no_sense_is_refused_with_a_reason(
    open_room: Open, folder: Path, exam: Exam, values: dict[str, Any], message: str
) -> None:
    answer = open_room(reader="Ann").post(f"/api/exams/{exam.key}/readings", json=reading(exam, **values))
    assert answer.status_code == 422
    assert message in answer.json()["detail"]
    assert not (folder / "readings.jsonl").exists()


@pytest.mark.parametrize("corners", [[5, 5, 5, 9], [-9, -9, -1, -1], [0, 0, 1], [0, 0, 1, float("inf")]])
def test_a_box_outside_its_image_is_refused(open_room: Open, exam: Exam, corners: list[float]) -> None:
    box = box_on(exam, "R") | {"box": corners}
    content = json.dumps(reading(exam, boxes=[box]))
    headers = {"Content-Type": "application/json"}
    answer = open_room(reader="Ann").post(f"/api/exams/{exam.key}/readings", content=content, headers=headers)
    assert answer.status_code == 422


def test_a_reader_types_the_name_once(open_room: Open, exam: Exam) -> None:
    client = open_room()
    assert client.post(f"/api/exams/{exam.key}/readings", json=reading(exam)).status_code == 422
    assert client.post("/reader", data={"name": "  "}).status_code == 422
    assert client.post("/reader", data={"name": " Jürgen  Ö "}).status_code == 200
    assert client.post(f"/api/exams/{exam.key}/readings", json=reading(exam)).json()["reader"] == "Jürgen Ö"
    elsewhere = {"Origin": "http://evil.example"}
    assert client.post(f"/api/exams/{exam.key}/readings", json=reading(exam), headers=elsewhere).status_code == 403


def test_readings_come_back_as_labels_through_etl_and_evaluate(
    open_room: Open, folder: Path, exam: Exam, run: Path, tmp_path: Path
) -> None:
    client = open_room(reader="Ann")
    client.post(f"/api/exams/{exam.key}/readings", json=reading(exam, left="5"))
    client.post(f"/api/exams/{exam.key}/readings", json=reading(exam, boxes=[box_on(exam, "L")], id="two"))
    table = tmp_path / "export.csv"
    assert main(["view", str(folder), "--export", str(table)]) == 0
    assert client.get("/readings.csv").text == table.read_text()
    labels = read_inputs([str(table)], "auto").set_index("image_id")
    assert set(labels.index) == {image.image_id for image in exam.images}
    for image in exam.images:
        row = labels.loc[image.image_id]
        assert (row.path, row.laterality, row.view) == (image.path, image.side, image.view)
        assert row.birads == {"R": 2, "L": 4}[image.side], "the latest reading counts, and 4B is 4"
    boxed = labels[labels["finding_boxes"].notna() & (labels["finding_boxes"] != "")]
    assert boxed["finding_boxes"].tolist() == ["10 20 40.5 60"]
    assert labels["cancer"].isna().all(), "no pathology is known"
    crops = tmp_path / "crops"
    assert main(["etl", str(table), str(crops), "--size", "64x32", "--workers", "1"]) == 0
    assert read_manifest(crops / "manifest.csv")["birads"].tolist() == labels["birads"].tolist()
    command = ["evaluate", str(run / "package"), str(crops / "manifest.csv"), str(tmp_path / "measured")]
    assert main([*command, "--label", "birads>=4", "--no-card", "--no-audit", "--replicates", "100"]) == 0
    measured = json.loads((tmp_path / "measured" / "metrics.json").read_text())["breast"]
    assert (measured["units"], measured["positives"]) == (2, 1)


def test_of_two_readers_etl_takes_the_worst_category(open_room: Open, folder: Path, exam: Exam, tmp_path: Path) -> None:
    for name, right in (("Ann", "2"), ("Bo", "5")):
        body = reading(exam, right=right, id=name)
        assert open_room(reader=name).post(f"/api/exams/{exam.key}/readings", json=body).status_code == 200
    assert main(["view", str(folder), "--export", str(tmp_path / "all.csv")]) == 0
    labels = read_inputs([str(tmp_path / "all.csv")], "auto")
    assert labels.loc[labels["laterality"] == "R", "birads"].unique().tolist() == [5]
    assert main(["view", str(folder), "--export", str(tmp_path / "ann.csv"), "--reader", "Ann"]) == 0
    labels = read_inputs([str(tmp_path / "ann.csv")], "auto")
    assert labels.loc[labels["laterality"] == "R", "birads"].unique().tolist() == [2]


def test_an_export_without_readings_is_refused(folder: Path, tmp_path: Path) -> None:
    assert main(["view", str(folder), "--export", str(tmp_path / "export.csv")]) == 2
    assert not (tmp_path / "export.csv").exists()


def numbers_in(value: Any) -> set[float]:
    """Return all numbers in nested lists and dictionaries."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {value} if isinstance(value, float) else set().union(*map(numbers_in, parts))


def test_a_blinded_reader_cannot_get_a_score_before_the_reading_is_stored(
    open_room: Open, exam: Exam, run: Path
) -> None:
    client = open_room(reader="Ann", blind=True, package=(run / "package",))
    secret = {image.probability for image in exam.images} | {breast.probability for breast in exam.breasts}
    secret |= {image.typicality for image in exam.images} - {None}
    secret |= {limit for breast in exam.breasts for limit in breast.interval or ()}
    hidden = client.get(f"/api/exams/{exam.key}").json()
    assert hidden["hidden"]
    assert not numbers_in(hidden) & secret
    assert all(breast["is_positive"] is None and not breast["outputs"] for breast in hidden["breasts"])
    assert not any(image["region"] for image in hidden["images"])
    assert client.get(f"/api/images/{exam.images[0].key}/heat-maps/gradient").status_code == 403
    assert " %</b>" not in client.get("/").text
    for address in ("/?sort=probability", "/?sort=difference", "/?only=positive"):
        assert client.get(address).status_code == 422
    for address in ("/readings.csv", "/reader-study.csv"):
        assert client.get(address).status_code == 403
    incomplete = reading(exam, left="")
    assert client.post(f"/api/exams/{exam.key}/readings", json=incomplete).status_code == 422
    agreeing = reading(exam)
    agreeing["breasts"]["R"]["agrees"] = True
    assert client.post(f"/api/exams/{exam.key}/readings", json=agreeing).status_code == 422
    shown = client.post(f"/api/exams/{exam.key}/readings", json=reading(exam)).json()
    assert secret - {None} <= numbers_in(shown)
    assert client.get("/").text.count(" %</b>") == 2, "the other exams stay hidden"
    assert client.get(f"/api/images/{exam.images[0].key}/heat-maps/gradient").status_code == 202


def test_a_reading_of_one_reader_opens_scores_for_no_other(open_room: Open, exam: Exam) -> None:
    client = open_room(blind=True)
    client.post("/reader", data={"name": "Ann"})
    assert not client.post(f"/api/exams/{exam.key}/readings", json=reading(exam)).json()["hidden"]
    client.cookies.clear()
    for name in ("", "Bo"):
        if name:
            client.post("/reader", data={"name": name})
        described = client.get(f"/api/exams/{exam.key}").json()
        assert described["hidden"]
        assert described["readings"] == []


def test_each_blinded_reader_has_an_own_order_that_stays(open_room: Open, folder: Path) -> None:
    keys = [exam.key for exam in read_scores_folder(folder)]

    def order(name: str) -> list[str]:
        client = open_room(reader=name, blind=True)
        page = client.get("/").text
        listed = sorted(keys, key=lambda key: page.index(f"/exams/{key}"))
        walked = [listed[0]]
        while (after := client.get(f"/api/exams/{walked[-1]}").json()["after"]) is not None:
            walked.append(after)
        assert walked == listed
        return listed

    orders = [order(name) for name in ("Ann", "Bo", "Cy")]
    assert order("Ann") == orders[0]
    assert len({tuple(found) for found in [*orders, keys]}) == 4


def test_the_study_table_has_a_row_per_reader_exam_and_breast(
    open_room: Open, folder: Path, exam: Exam, tmp_path: Path
) -> None:
    blinded = open_room(reader="Ann", blind=True)
    address = f"/api/exams/{exam.key}/readings"
    blinded.post(address, json=reading(exam, seconds=30, boxes=[box_on(exam, "L")]))
    blinded.post(address, json=reading(exam, right="1", seconds=99, id="two"))
    open_room(reader="Bo").post(address, json=reading(exam, left="5", id="three"))
    assert main(["view", str(folder), "--export-study", str(tmp_path / "study.csv")]) == 0
    table = pd.read_csv(tmp_path / "study.csv", dtype={"birads_unaided": str, "birads_aided": str})
    assert table["reader"].tolist() == ["Ann", "Ann", "Bo", "Bo"]
    rows = table.set_index(["reader", "laterality"])
    assert rows.loc[("Ann", "R"), ["birads_unaided", "birads_aided"]].tolist() == ["2", "1"]
    assert rows.loc[("Ann", "L"), ["birads_unaided", "birads_aided"]].tolist() == ["4B", "4B"]
    assert pd.isna(rows.loc[("Bo", "L"), "birads_unaided"])
    assert rows.loc[("Bo", "L"), "birads_aided"] == "5"
    assert rows.loc[("Ann", "L"), ["seconds", "boxes", "position"]].tolist() == [30, 1, 1]
    for side in "RL":
        assert rows.loc[("Ann", side), "probability"] == pytest.approx(exam.breast(side).probability)  # type: ignore[union-attr]


def test_unread_exams_are_those_that_the_reader_has_not_read(open_room: Open, exam: Exam) -> None:
    client = open_room()
    client.post("/reader", data={"name": "Ann"})
    client.post(f"/api/exams/{exam.key}/readings", json=reading(exam))
    assert f"/exams/{exam.key}" not in client.get("/?only=unread").text
    client.post("/reader", data={"name": "Bo"})
    assert f"/exams/{exam.key}" in client.get("/?only=unread").text
    client.cookies.clear()
    assert f"/exams/{exam.key}" not in client.get("/?only=unread").text, "without a name, read by anybody"


def test_the_worklist_filters_by_machine(open_room: Open, folder: Path) -> None:
    exams = read_scores_folder(folder)
    machines = {image.machine for exam in exams for image in exam.images if image.machine}
    assert machines
    client = open_room()
    for machine in machines:
        page = client.get("/", params={"machine": machine}).text
        for exam in exams:
            expected = any(image.machine == machine for image in exam.images)
            assert (f"/exams/{exam.key}" in page) == expected
    assert "No exam matches" in client.get("/", params={"machine": "%"}).text


def test_the_date_of_an_exam_is_that_of_its_headers(open_room: Open, folder: Path, exam: Exam, tmp_path: Path) -> None:
    journal = folder / "journal.jsonl"
    text = journal.read_text()
    for number, image in enumerate(exam.images):
        assert image.path
        dataset = pydicom.dcmread(image.path)
        dataset.StudyDate = "20240229"
        dataset.save_as(tmp_path / f"{number}.dcm")
        text = text.replace(json.dumps(image.path), json.dumps(str(tmp_path / f"{number}.dcm")))
    journal.write_text(text)
    client = open_room()
    assert client.get("/").text.count("<td>2024-02-29</td>") == 1
    assert client.get(f"/api/exams/{exam.key}").json()["date"] == "2024-02-29"


def test_the_age_of_the_result_is_in_words() -> None:
    ages = {30: "just now", 61: "1 minute ago", 7300: "2 hours ago", 86400 * 3 + 5: "3 days ago", -5: "just now"}
    assert {gap: describe_age(gap) for gap in ages} == ages


def test_two_models_are_shown_next_to_each_other(open_room: Open, folder: Path, tmp_path: Path, exam: Exam) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "second"))
    table = pd.read_csv(other / "breast_scores.csv", dtype={"patient_id": str})
    table["probability"] = (table["probability"] * 0.5).round(6)
    table.to_csv(other / "breast_scores.csv", index=False)
    client = open_room(compare=other)
    for breast in client.get(f"/api/exams/{exam.key}").json()["breasts"]:
        assert breast["other"] == pytest.approx(breast["probability"] / 2, abs=1e-6)
    scored = table["probability"].dropna()
    page = client.get("/?sort=difference").text
    assert all(f"{100 * value:.1f} %" in page for value in scored)
    largest = table.loc[table["probability"].idxmax(), "patient_id"]
    assert page.index(f">{largest}</a>") == page.index("</a></th>") - len(f">{largest}")
    hidden = open_room(compare=other, blind=True, reader="Ann")
    assert all(breast["other"] is None for breast in hidden.get(f"/api/exams/{exam.key}").json()["breasts"])


def test_scores_of_other_patients_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "second"))
    for name in ("scores.csv", "breast_scores.csv"):
        table = pd.read_csv(other / name, dtype=str)
        table.assign(patient_id=table["patient_id"] + "x").to_csv(other / name, index=False)
    with pytest.raises(UsageError, match=r"compare: .* has no exam of"):
        create_app(ViewConfig(scores=folder, compare=other))


def test_other_exams_of_the_patient_are_linked(open_room: Open, folder: Path) -> None:
    first, second, third = read_scores_folder(folder)[:3]
    for name in ("scores.csv", "breast_scores.csv"):
        table = pd.read_csv(folder / name, dtype=str)
        table["exam_id"] = table["patient_id"]
        table["patient_id"] = table["patient_id"].replace(second.patient_id, first.patient_id)
        table.to_csv(folder / name, index=False)
    client = open_room()
    one, two, three = (
        next(exam for exam in read_scores_folder(folder) if exam.exam_id == old.patient_id)
        for old in (first, second, third)
    )
    described = {exam.key: client.get(f"/api/exams/{exam.key}").json()["others"] for exam in (one, two, three)}
    assert [other["key"] for other in described[one.key]] == [two.key]
    assert [other["key"] for other in described[two.key]] == [one.key]
    assert described[three.key] == []
    shown = [breast["probability"] for breast in described[one.key][0]["breasts"]]
    assert np.allclose(shown, [breast.probability for breast in second.breasts])  # type: ignore[arg-type]


def test_the_page_names_the_model_and_serves_its_card_as_text(open_room: Open, run: Path, exam: Exam) -> None:
    client = open_room(package=(run / "package",))
    model = client.get(f"/api/exams/{exam.key}").json()["model"]
    assert 0 < model["prevalence"] < 1
    assert "validation patients" in model["notes"]["Calibration"]
    card = client.get("/model-card")
    assert card.text == (run / "package" / "MODEL_CARD.md").read_text()
    assert card.headers["Content-Type"].startswith("text/plain")
    assert open_room().get("/model-card").status_code == 404


def test_doubts_are_whole_sentences(open_room: Open, folder: Path) -> None:
    client = open_room()
    doubtful = next(exam for exam in read_scores_folder(folder) if any(breast.reason for breast in exam.breasts))
    for breast in client.get(f"/api/exams/{doubtful.key}").json()["breasts"]:
        assert bool(breast["reason"]) == (len(breast["meaning"]) > 20)


def test_a_file_that_cannot_be_written_loses_no_reading_unnoticed(open_room: Open, tmp_path: Path, exam: Exam) -> None:
    client = open_room(reader="Ann", readings=tmp_path / "missing" / "readings.jsonl")
    answer = client.post(f"/api/exams/{exam.key}/readings", json=reading(exam))
    assert answer.status_code == 500
    assert "cannot write" in answer.json()["detail"]
    assert client.get(f"/api/exams/{exam.key}").json()["readings"] == []


@pytest.mark.parametrize("line", ['{"key": "a"}', '["a"]', '{"key": "a", "breasts": [], "boxes": []}'])
def test_a_file_of_something_else_is_refused_and_kept(folder: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match=r"readings: .* is not a file that"):
        create_app(ViewConfig(scores=folder, readings=path))
    assert path.read_text() == line + "\n"


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VitmodelError, match="blind: has no effect"):
        ViewConfig(scores=tmp_path, blind=True, export=tmp_path / "export.csv")
