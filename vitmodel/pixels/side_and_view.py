"""Read the side and the view of a mammogram from words and codes, wherever vendors put them.

The words of hospitals' tables and of DICOM headers are the same. Sources: DICOM PS3.16 CID 4014 and 4015 (views), the
labels of the American College of Radiology (side, view, modifier: RCCRL), and the words that vendors and
technologists write in English, German, French, Spanish, Portuguese and Italian.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vitmodel.pixels.tags import TagReader

BREAST_VIEWS = {"CC", "MLO", "ML", "LM", "LMO", "XCC", "XCCL", "XCCM", "FB", "SIO", "ISO", "AT", "CV"}
VIEW_CODES = {
    "CC": ("399162004", "R-10242"),
    "MLO": ("399368009", "R-10226"),
    "ML": ("399260004", "R-10224"),
    "LM": ("399352003", "R-10228"),
    "LMO": ("399099002", "R-10230"),
    "XCCL": ("399192008", "R-1024A"),
    "XCCM": ("399101009", "R-1024B"),
    "FB": ("399196006", "R-10244"),
    "SIO": ("399188001", "R-102D0"),
    "ISO": ("441555000", "R-40AAA"),
    "AT": ("399011000", "R-102D1"),
    "CV": ("399161006", "R-102D2"),
}
"""Codes of each view in SNOMED CT, and in SRT (also SNM3, 99SDM) as found in older files.

Source: DICOM PS3.16 CID 4014 and the two projections of CID 4015.
"""
VIEW_OF_CODE = {code: view for view, codes in VIEW_CODES.items() for code in codes}
SIDE_OF_CODE = {
    **dict.fromkeys(("7771000", "G-A101", "80248007", "T-04030"), "L"),
    **dict.fromkeys(("24028007", "G-A100", "73056007", "T-04020"), "R"),
}
"""Codes of the modifiers left and right (PS3.16 CID 244), and of the left and the right breast (CID 6004)."""

LEFT_WORDS = frozenset(
    ("l", "left", "lt", "links", "linke", "gauche", "izq", "izquierda", "izquierdo", "esquerda", "sinistra", "sx")
)
RIGHT_WORDS = frozenset(
    ("r", "right", "rt", "rechts", "rechte", "droite", "droit", "dcha", "derecha", "derecho", "direita", "destra", "dx")
)
BOTH_WORDS = frozenset(("b", "both", "bilateral", "bilaterale", "beide", "beidseits", "ambas", "ambos", "lr", "rl"))
"""Words for an image of both breasts."""
LEFT = LEFT_WORDS | {"li", "g", "i", "e"}
RIGHT = RIGHT_WORDS | {"re", "d"}
"""Words of a side where nothing else is expected; in free text, only the longer ones and L and R count."""
WORD_VIEWS = {"FB", "SIO", "ISO", "AT", "CV"}
"""Views whose letters mean other things in a description of a series."""

PHRASES = (
    (r"(exaggerated|exagerada|exagere)\w* cran[ie]o ?caudal\w* (medial|intern)\w*|xcc medial\w*", "XCCM"),
    (r"(exaggerated|exagerada|exagere)\w* cran[ie]o ?caudal\w* (lateral|extern)\w*|xcc lateral\w*", "XCCL"),
    (r"(exaggerated|exagerada|exagere)\w* cran[ie]o ?caudal\w*", "XCC"),
    (r"superolateral to inferomedial oblique", "SIO"),
    (r"inferomedial to superolateral oblique", "ISO"),
    (r"caudo ?cran[ie]al\w*|from below", "FB"),
    (r"latero ?medial\w* ?(obli|schrag)\w*|(obli\w+) latero ?medial\w*", "LMO"),
    (r"medio ?lateral\w* ?(obli|schrag)\w*|(obli\w+) medio ?lateral\w*", "MLO"),
    (r"cran[ie]o ?caudal\w*|cr(an)? caud\w*|face", "CC"),
    (r"latero ?medial\w*", "LM"),
    (r"medio ?lateral\w*|profil|perfil", "ML"),
    (r"axillary tail", "AT"),
    (r"cleavage", "CV"),
    (r"(obli[cq]u\w*|schrag\w*)", "MLO"),
)
"""Names of views in words, without accents and punctuation; a longer name precedes those that it contains."""
_VIEW = "|".join(sorted({*BREAST_VIEWS, "OML"}, key=lambda view: (-len(view), view))).lower()
LABEL = re.compile(
    rf"(?!lat$|rat$)(?P<side>[lr]|left|right)?(?P<view>{_VIEW})(id|r[lmis]|m|s|tan|spot|mag)?(?P<last>[degilr])?\d*"
)
"""A view, with a side before or after it (E, G and I are left, D is right) and modifiers such as ID (implant)."""
AMOUNT = re.compile(r"\d+ ?ml\b")


class SideAndView(NamedTuple):
    """What a text says; '' = nothing, or several things."""

    side: str
    view: str


def fold(text: str) -> str:
    """Return text in lower case, without accents and surrounding spaces."""
    decomposed = unicodedata.normalize("NFKD", text.strip().lower())
    return "".join(character for character in decomposed if not unicodedata.combining(character))


def read_side(text: str) -> str:
    """Return L or R for a word of a side, which the word breast may accompany; '' for other text."""
    words = set(re.findall(r"[a-z]+", fold(text))) - {"breast", "mamma", "mama", "sein", "seno", "brust"}
    return "L" if words and words <= LEFT else "R" if words and words <= RIGHT else ""


def find_side_and_view(text: str, is_free_text: bool = False) -> SideAndView:
    """Return the side and the view that a text names; what it names twice with different values is unknown.

    Args:
        text: Words such as "LCC", "R-MLO", "MLO ID", "cráneo-caudal izquierda".
        is_free_text: Whether the text may be about other things, so that only unmistakable words count.
    """
    rest = re.sub(r"\b([a-z])\.", r"\1", fold(text))  # C.C.
    rest = re.sub(r"[^a-z0-9]+", " ", rest).strip()
    if is_free_text:
        rest = AMOUNT.sub(" ", rest)
    views: set[str] = set()
    for pattern, view in PHRASES:
        rest, count = re.subn(rf"\b({pattern})\b", " ", rest)
        if count:
            views.add(view)
    sides: set[str] = set()
    after_label = False
    for word in rest.split():
        label = LABEL.fullmatch(word)
        if label and is_free_text and label["view"].upper() in WORD_VIEWS:
            label = None
        any_letter = after_label or (bool(views) and not is_free_text)
        if label:
            views.add("MLO" if label["view"] == "oml" else label["view"].upper())
            letters = {(label["side"] or "")[:1], label["last"] or ""} - {""}
            sides |= {"L" if letter in LEFT else "R" for letter in letters}
        elif word in (LEFT if any_letter else LEFT_WORDS):
            sides.add("L")
        elif word in (RIGHT if any_letter else RIGHT_WORDS):
            sides.add("R")
        after_label = label is not None
    return SideAndView(sides.pop() if len(sides) == 1 else "", views.pop() if len(views) == 1 else "")


@dataclass(frozen=True)
class Statement:
    """A place in a header that states a side, a view or both."""

    source: str
    """Keyword of the tag."""
    text: str
    side: str
    view: str
    is_free_text: bool = False


SIDE_TAGS = ("ImageLaterality", "FrameLaterality", "Laterality")
REGION_SEQUENCES = ("AnatomicRegionSequence", "PrimaryAnatomicStructureSequence")
REGION_MODIFIERS = ("AnatomicRegionModifierSequence", "PrimaryAnatomicStructureModifierSequence")
FREE_TEXT_TAGS = (
    "AcquisitionDeviceProcessingDescription",
    "ViewName",
    "SeriesDescription",
    "ProtocolName",
    "AcquisitionProtocolName",
)
"""Tags for people; Fuji's computed radiography writes side and view in the first one only."""


def read_side_and_view(tags: TagReader) -> SideAndView:
    """Return side and view of the first place in the header that states them, '' where none does.

    A warning is added if another place contradicts it, or if only a text for people states it.
    """
    statements = list(_statements(tags))
    return SideAndView(_choose("side", statements, tags), _choose("view", statements, tags))


def _choose(kind: str, statements: list[Statement], tags: TagReader) -> str:
    """Return the first stated side or view, after adding the warnings about it."""
    stated = [statement for statement in statements if getattr(statement, kind)]
    if not stated:
        return ""
    first = stated[0]
    value: str = getattr(first, kind)
    if first.is_free_text:
        tags.add_warning(f"the {kind} {value} is taken from {first.source} (free text), no other tag states it")
    for other in stated[1:]:
        if not _agree(value, getattr(other, kind)):
            tags.add_warning(
                f"{first.source} states the {kind} {value}, but {other.source} states "
                f"{getattr(other, kind)}; the first one is taken"
            )
    return value


def _agree(first: str, second: str) -> bool:
    """Return whether two sides or views do not contradict each other: CC may stand for an exaggerated CC."""
    return first == second or ("CC" in first and "CC" in second)


def _statements(tags: TagReader) -> Iterator[Statement]:
    """Yield what each place of the header states, the most reliable ones first."""
    for keyword in SIDE_TAGS:
        text = tags.text(keyword)
        yield Statement(keyword, text, read_side(text), "")
    view = tags.text("ViewPosition")
    yield Statement("ViewPosition", view, *find_side_and_view(view))
    for item in tags.items("ViewCodeSequence"):
        meaning = item.text("CodeMeaning")
        by_word = find_side_and_view(meaning)
        by_code = VIEW_OF_CODE.get(item.code("CodeValue"), "")
        yield Statement("ViewCodeSequence", meaning, by_word.side, by_code or by_word.view)
    for item in _regions(tags):
        meaning = item.text("CodeMeaning")
        side = SIDE_OF_CODE.get(item.code("CodeValue")) or read_side(meaning)
        yield Statement("AnatomicRegionSequence", meaning, side, "")
    body_part = tags.text("BodyPartExamined")
    yield Statement("BodyPartExamined", body_part, read_side(body_part), "")
    for keyword in FREE_TEXT_TAGS:
        text = tags.text(keyword)
        yield Statement(keyword, text, *find_side_and_view(text, is_free_text=True), is_free_text=True)


def _regions(tags: TagReader) -> Iterator[TagReader]:
    """Yield the codes of the anatomic regions and of their modifiers, which may be items of the image or the region."""
    regions = [item for keyword in REGION_SEQUENCES for item in tags.items(keyword)]
    for holder in (tags, *regions):
        for keyword in REGION_MODIFIERS:
            yield from holder.items(keyword)
    yield from regions
