"""Side and view are read wherever vendors put them; contradictions and texts for people add a warning."""

from __future__ import annotations

import pytest
from pydicom import Dataset

from vitmodel.pixels.side_and_view import find_side_and_view, read_side, read_side_and_view
from vitmodel.pixels.tags import TagReader
from vitmodel.pixels.verdict import ImageWarning


def read(**tags: object) -> tuple[str, str, list[ImageWarning]]:
    """Return side, view and warnings of a header with these tags."""
    dataset = Dataset()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    warnings: list[ImageWarning] = []
    return *read_side_and_view(TagReader(dataset, warnings)), warnings


def code(value: str, meaning: str, **tags: object) -> list[Dataset]:
    item = Dataset()
    item.CodeValue, item.CodeMeaning, item.CodingSchemeDesignator = value, meaning, "SCT"
    for keyword, tag in tags.items():
        setattr(item, keyword, tag)
    return [item]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[(text, ("L", "CC")) for text in ("LCC", "L-CC", "l_cc", "CCE", "CC I", "CCG", "CC L", "LCCID", "left cc")],
        *[(text, ("R", "MLO")) for text in ("RMLO", "MLOD", "OMLD", "MLO D", "R MLO ID", "Oblicua derecha")],
        *[(text, ("", "CC")) for text in ("CRANIO-CAUDAL", "cráneo caudal", "craniocaudale", "CC 2", "CCRL")],
        *[(text, ("", "MLO")) for text in ("MLO-ID", "MLOID", "OML", "medio-lateral oblique", "mediolateraloblique")],
        *[(text, ("R", "CC")) for text in ("Face droite", "FACE D", "R C.C.", "Cr-Caud R")],
        *[(text, ("L", "ML")) for text in ("Profil gauche", "perfil izq", "L M.L.")],
        ("XCCL", ("", "XCCL")),
        ("RXCCM", ("R", "XCCM")),
        ("LMO", ("", "LMO")),
        ("LM", ("", "LM")),
        ("LML", ("L", "ML")),
        ("LLM", ("L", "LM")),
        *[(text, ("", "")) for text in ("", "AP", "LAT", "PA", "LL")],
        ("L CC R CC", ("", "CC")),
        ("R CC MLO", ("R", "")),
    ],
)
def test_a_view_is_read_with_its_side(text: str, expected: tuple[str, str]) -> None:
    assert find_side_and_view(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tomosynthesis Reconstruction R CC", ("R", "CC")),
        ("L MLO C-View", ("L", "MLO")),
        ("MLO D", ("R", "MLO")),
        ("Mamografía derecha", ("R", "")),
        ("100 ml contrast at 2 i.v.", ("", "")),
        ("R/L CC", ("", "CC")),
        ("Routine CC MLO", ("", "")),
    ],
)
def test_free_text_counts_only_where_it_is_unmistakable(text: str, expected: tuple[str, str]) -> None:
    assert find_side_and_view(text, is_free_text=True) == expected


def test_words_of_a_side() -> None:
    words = {"LEFT": "L", "Left breast": "L", "Rt.": "R", "derecha": "R", "B": "", "both": "", "": "", "left right": ""}
    assert {word: read_side(word) for word in words} == words


@pytest.mark.parametrize(
    "tags",
    [
        {"ImageLaterality": "LEFT", "ViewPosition": "CC"},
        {"FrameLaterality": "L", "ViewPosition": "CC"},
        {"Laterality": "L", "ViewCodeSequence": code("R-10242", "")},
        {"ViewPosition": "LCC"},
        {"ViewCodeSequence": code("", "left cranio-caudal")},
        {"ViewPosition": "CC", "AnatomicRegionModifierSequence": code("7771000", "")},
        {
            "ViewPosition": "CC",
            "AnatomicRegionSequence": code("76752008", "Breast", AnatomicRegionModifierSequence=code("", "Left")),
        },
        {"ViewPosition": "CC", "BodyPartExamined": "LEFT BREAST"},
    ],
)
def test_every_place_of_the_standard_is_read_without_a_warning(tags: dict[str, object]) -> None:
    assert read(**tags) == ("L", "CC", [])


@pytest.mark.parametrize("keyword", ["AcquisitionDeviceProcessingDescription", "SeriesDescription", "ProtocolName"])
def test_a_text_for_people_is_named_as_the_source(keyword: str) -> None:
    side, view, warnings = read(**{keyword: "L CC"})
    assert (side, view) == ("L", "CC")
    assert [warning.code for warning in warnings] == ["assumed_values"] * 2
    assert all(keyword in warning.message for warning in warnings)


def test_a_contradiction_names_both_places_and_the_first_is_taken() -> None:
    side, view, [warning] = read(ImageLaterality="R", ViewPosition="LCC")
    assert (side, view) == ("R", "CC")
    assert "ImageLaterality states the side R, but ViewPosition states L" in warning.message
    assert read(ViewPosition="CC", ViewCodeSequence=code("399192008", ""))[2] == [], "XCCL is a CC view"
    assert len(read(ViewPosition="CC", ViewCodeSequence=code("399368009", ""))[2]) == 1
