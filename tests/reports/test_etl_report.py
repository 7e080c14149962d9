"""The ETL report counts every image, explains every reason, draws the crop boxes correctly and is one safe file."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from page_parser import ADDRESSES, PageParser

from vitmodel.config import Preprocessing
from vitmodel.data.manifest import as_manifest, read_manifest, usable_rows
from vitmodel.errors import UsageError
from vitmodel.pixels.verdict import REFUSAL_REASONS, WARNING_REASONS
from vitmodel.reports.contact_sheet import BOX_COLOUR, THUMBNAIL_SIDE, sample_by_reason, source_thumbnail
from vitmodel.reports.etl import (
    count_by_status,
    count_values,
    fold_mirrored,
    format_percentage,
    image_properties,
    summarize_reasons,
    summarize_sides,
    write_etl_report,
)
from vitmodel.utils import NOT_A_MEDICAL_DEVICE


class Page(PageParser):
    """The visible text and the pictures of a page.

    Parsing asserts that every opened tag is closed and that every address contains its picture.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.pictures: list[np.ndarray] = []
        html = path.read_text()
        assert "url(" not in html
        assert "@import" not in html
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ADDRESSES:
                picture = base64.b64decode(value.removeprefix("data:image/jpeg;base64,"), validate=True)
                self.pictures.append(cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR))


def report_on(manifest: pd.DataFrame, folder: Path) -> Page:
    """Write the report on a manifest and return the parsed page."""
    write_etl_report(folder / "etl_report.html", manifest, jobs=1)
    return Page(folder / "etl_report.html")


@pytest.fixture(scope="module")
def manifest(crops: Path) -> pd.DataFrame:
    """The ETL's manifest of the synthetic release, with refused images and warnings added to some others."""
    table = read_manifest(crops / "manifest.csv")
    ok = table.index[table.status == "ok"]
    table.loc[ok[:6], ["status", "reason", "remark"]] = ["warned", "lossy", "lossy compression, ratio 10"]
    table.loc[ok[:2], ["reason", "remark"]] = [
        "lossy;doubtful_side",
        "lossy compression, ratio 10; both sides are alike",
    ]
    return table


def table_of(**columns: list[object]) -> pd.DataFrame:
    """Return a manifest with these columns and default values for missing required ones."""
    count = len(next(iter(columns.values())))
    names = [f"i{row}" for row in range(count)]
    defaults = {
        "image_id": names,
        "patient_id": names,
        "laterality": "L",
        "view": "CC",
        "path": [f"/{name}.png" for name in names],
    }
    return as_manifest(pd.DataFrame(defaults | columns), "table")


def test_every_row_is_counted_once(manifest: pd.DataFrame, tmp_path: Path) -> None:
    count = {verdict: sum(status == verdict for status in manifest.status) for verdict in ("ok", "warned", "refused")}
    assert all(count.values())
    assert sum(count.values()) == len(manifest)
    for column in ("site_id", "machine_id"):
        table = count_by_status(manifest, column)
        assert table.images.sum() == len(manifest)
        assert {verdict: table[verdict].sum() for verdict in count} == count
    used = usable_rows(manifest)
    for title, values in image_properties(used).items():
        assert count_values(values).sum() == len(used), title
    page = report_on(manifest, tmp_path)
    assert f"{count['ok']} + {count['warned']} + {count['refused']} = {len(manifest)}" in page.words
    assert all(image_id in page.text for image_id in manifest.image_id[manifest.status == "refused"])
    shown_refusals = int((manifest.reason == "blank").sum())  # the other refused files have no picture
    assert shown_refusals
    assert len(page.pictures) == shown_refusals + 2 * min(48, len(used))
    assert NOT_A_MEDICAL_DEVICE in page.words


def test_every_reason_is_explained_and_counted(tmp_path: Path) -> None:
    codes = [*REFUSAL_REASONS, *WARNING_REASONS]
    status = ["refused"] * len(REFUSAL_REASONS) + ["warned"] * (len(WARNING_REASONS) + 1)
    manifest = table_of(status=status, reason=[*codes, "lossy;inverted;lossy"])
    manifest = manifest.assign(path=[f"{tmp_path}/{name}.png" for name in manifest.image_id])
    table = summarize_reasons(manifest)
    assert set(table.index) == set(codes)
    assert table.images["lossy"] == table.images["inverted"] == 2
    assert table.images.sum() == len(codes) + 2
    assert table.examples["lossy"] == f"i{codes.index('lossy')}, i{len(codes)}"
    assert list(table.verdict) == ["refused"] * len(REFUSAL_REASONS) + ["warned"] * len(WARNING_REASONS)
    words = report_on(manifest[manifest.status == "refused"], tmp_path).words
    assert all(code in words and meaning in words for code, meaning in REFUSAL_REASONS.items())


def test_an_unknown_reason_code_is_shown(manifest: pd.DataFrame, tmp_path: Path) -> None:
    table = manifest.assign(reason=manifest.reason.replace("lossy", "forgotten_code"))
    assert "forgotten_code" in report_on(table, tmp_path).words


def test_mirrored_images_are_counted_per_machine_and_patient() -> None:
    """Unknown sides are not compared.

    Machine A mirrors all images of p1, one of p2 and none of p3. The only comparable image of machine B is correct.
    """
    rows = [
        ("A", "p1", "L", "right"),
        ("A", "p1", "R", "left"),
        ("A", "p2", "L", "right"),
        ("A", "p2", "R", "right"),
        ("A", "p3", "L", "left"),
        ("B", "p4", "R", "right"),
        ("B", "p4", "", "right"),
        ("C", "p5", "L", None),
        (None, "p6", "R", "left"),
    ]
    names = ("machine_id", "patient_id", "laterality", "chest_wall_side")
    columns = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    table = summarize_sides(table_of(**columns))
    assert table.loc["A"].to_dict() == {"images": 5, "mirrored": 3, "patients": 3, "all": 1, "some": 1}
    assert table.loc["B"].to_dict() == {"images": 1, "mirrored": 0, "patients": 1, "all": 0, "some": 0}
    assert table.loc["unknown"].to_dict() == {"images": 1, "mirrored": 1, "patients": 1, "all": 1, "some": 0}
    assert "C" not in table.index
    assert table.index[0] == "A"


def test_a_release_that_is_mirrored_as_a_whole_is_said_once(manifest: pd.DataFrame, tmp_path: Path) -> None:
    """Films m0 to m9 are mirrored but for m9; of release b, one of five images is."""
    code = "laterality_mismatch"
    films = table_of(
        image_id=[*(f"m{row}" for row in range(10)), *(f"b{row}" for row in range(5)), "x"],
        dataset=["mias"] * 10 + ["b"] * 5 + ["mias"],
        chest_wall_side=["right"] * 9 + ["left"] * 5 + ["right", None],
        status=["warned"] * 9 + ["ok"] * 5 + ["warned", "refused"],
        reason=[f"{code};lossy", *[code] * 8, *[None] * 5, code, "blank"],
    )
    shown, sentences = fold_mirrored(films)
    assert [sentence.split(" are ")[0] for sentence in sentences] == ["mias: 9 of 10 images"]
    assert shown.reason.fillna("").tolist() == ["lossy", *[""] * 13, code, "blank"]
    assert shown.status.tolist() == ["warned", *["ok"] * 13, "warned", "refused"]
    assert films.reason[1] == code, "the manifest itself is not changed"

    apart = films.assign(dataset=["a"] * 3 + ["b"] * 13)
    assert fold_mirrored(apart)[1] == [], "three images are no release, and half of b is not mirrored"
    pd.testing.assert_frame_equal(fold_mirrored(apart)[0], apart)

    machines = films.assign(dataset="c", machine_id=["x"] * 10 + ["y"] * 5 + [None])
    assert fold_mirrored(machines)[1][0].startswith("c, machine x: 9 of 10 images are mirrored")
    assert len(fold_mirrored(machines)[1]) == 1

    mirrored = manifest.assign(laterality=manifest.chest_wall_side.map({"left": "R", "right": "L"}).fillna(""))
    assert fold_mirrored(mirrored)[1][0] in report_on(mirrored, tmp_path).words


def test_a_manifest_without_used_images_or_sites_is_reported(tmp_path: Path) -> None:
    manifest = table_of(status=["refused"] * 60, reason=["blank"] * 59 + ["no_breast"], remark=["grey"] * 60)
    page = report_on(manifest, tmp_path)
    assert count_by_status(manifest, "site_id").to_dict("index") == {
        "unknown": {"ok": 0, "warned": 0, "refused": 60, "images": 60}
    }
    assert "50 of 60 refused images" in page.words
    assert page.words.count("grey") == 50
    assert len(set(re.findall(r"\bi\d+", page.words))) >= 50
    assert "i59 no_breast" in page.words  # the rare reason is not displaced by the frequent one
    assert "Contact sheet" not in page.words


def test_text_is_escaped_and_patient_ids_are_not_shown(manifest: pd.DataFrame, tmp_path: Path) -> None:
    hostile = "<script>alert('&')</script>"
    folder = "/nowhere/secret-patient/"
    source = folder + manifest.image_id
    remark = manifest.remark.fillna(hostile).where(manifest.reason != "missing_file", source + " does not exist")
    table = manifest.assign(
        patient_id="secret-patient-" + manifest.patient_id,
        source_path=source,
        remark=remark,
        image_id=manifest.image_id + hostile,
        site_id=hostile,
        machine_id=hostile,
        dataset=hostile,
        voi=hostile,
    )
    page = report_on(table, tmp_path)
    assert page.text.count(hostile) > len(page.pictures)
    assert "secret-patient" not in (tmp_path / "etl_report.html").read_text()
    assert "the file does not exist" in page.words
    assert "The source cannot be shown: the file does not exist." in page.words


def test_the_same_manifest_gives_the_same_bytes(manifest: pd.DataFrame, tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_etl_report(tmp_path / name, manifest, jobs=2)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_row_without_a_status_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'status': empty in 1 rows"):
        write_etl_report(tmp_path / "etl_report.html", table_of(status=["ok", None]))


def outline(picture: np.ndarray) -> tuple[int, int, int, int]:
    """Return x0, y0, x1, y1 around the pixels that have the colour of the box."""
    y, x = np.nonzero((picture == BOX_COLOUR).all(axis=2))
    return x.min(), y.min(), x.max() + 1, y.max() + 1


@pytest.mark.parametrize("box", [(100, 50, 500, 550), (0, 0, 800, 1000), (400, 200, 800, 1000)])
def test_the_box_is_drawn_where_the_manifest_says(box: tuple[int, int, int, int], tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "source.png"), np.full((1000, 800), 77, np.uint8))
    picture = source_thumbnail(tmp_path / "source.png", box, Preprocessing())
    assert picture.shape == (THUMBNAIL_SIDE, 256, 3)
    assert outline(picture) == tuple(round(0.32 * edge) for edge in box)
    coloured = (picture == BOX_COLOUR).all(axis=2)
    assert (picture[~coloured] == 77).all()
    assert 0 < coloured.sum() <= 2 * 2 * (THUMBNAIL_SIDE + 256)  # lines, not a filled area


def test_boxes_are_drawn_on_every_file_format_of_the_release(manifest: pd.DataFrame) -> None:
    """The images are smaller than a thumbnail, so the drawn box equals the one in the manifest."""
    used = usable_rows(manifest)
    assert used.transfer_syntax.nunique() > 2
    for row in used.itertuples():
        box = (int(row.box_x0), int(row.box_y0), int(row.box_x1), int(row.box_y1))
        assert outline(source_thumbnail(Path(row.source_path), box, Preprocessing())) == box


def test_the_sample_alternates_between_reasons_with_the_rarest_first() -> None:
    table = table_of(reason=["lossy"] * 500 + ["lossy;inverted"] * 20 + ["doubtful_crop"] + [None] * 479)
    chosen = sample_by_reason(table, 30)
    assert list(chosen.group.drop_duplicates()) == ["doubtful_crop", "inverted", "lossy", ""]
    assert chosen.group.value_counts().to_dict() == {"doubtful_crop": 1, "inverted": 10, "lossy": 10, "": 9}
    assert chosen.image_id.is_unique
    assert len(sample_by_reason(table, 2000)) == len(table)
    assert sample_by_reason(table.head(0), 30).empty


def test_rare_values_are_merged_and_still_counted() -> None:
    values = pd.Series(["a"] * 9 + ["b"] * 5 + list("cdefghijkl") + [None] * 7)
    counts = count_values(values, most=3)
    assert counts.to_dict() == {"other (10 values)": 10, "a": 9, "unknown": 7, "b": 5}
    assert count_values(pd.Series(list("aab")), most=1).to_dict() == {
        "a": 2,
        "b": 1,
    }  # a single rare value is not merged


def test_only_zero_is_0_percent_and_only_the_whole_is_100_percent() -> None:
    percentages = [format_percentage(part, 54706) for part in (0, 1, 547, 54705, 54706)]
    assert percentages == ["0 %", "0.1 %", "1.0 %", "99.9 %", "100 %"]
