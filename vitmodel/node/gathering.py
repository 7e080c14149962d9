"""Decide when a study is complete: DICOM has no message for it (pure functions)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["wait", "ready", "forced", "late", "refused", "ignored"]
STANDARD_VIEWS = frozenset({("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO")})


@dataclass(frozen=True, kw_only=True)
class GatheringRules:
    """When a study counts as complete."""

    quiet_seconds: float = 60.0
    """Time without a new object after which a study is complete."""
    max_seconds: float = 1800.0
    """Time after which a study is scored although objects still arrive."""
    max_images: int = 500
    """Most images of a study."""


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What a decision needs to know about a received object."""

    sop_uid: str
    side: str = ""
    view: str = ""
    patient_id: str = ""
    ignored: str = ""
    """Why the object is not scored; empty = it is."""


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """What a decision needs to know about a study."""

    images: Sequence[ImageFacts]
    first_arrival: float
    """Arrival of the first object that no decision has considered, in seconds."""
    last_arrival: float
    open_transfers: int = 0
    """Number of open associations that have sent objects of the study."""
    scored: frozenset[str] = frozenset()
    """SOP Instance UIDs of the study's last job; empty = it has none."""


@dataclass(frozen=True)
class Decision:
    """What to do with a study, and why."""

    verdict: Verdict
    reason: str
    images: tuple[str, ...] = ()
    """Sorted SOP Instance UIDs to score."""


def decide(study: StudyFacts, now: float, rules: GatheringRules) -> Decision:
    """Return what to do with a study at the time `now`.

    A study is ready as soon as it has the four standard views and nobody sends more of it, otherwise when nothing has
    arrived for the quiet time. A study that never becomes quiet is forced. Images that arrive after a job was made give
    a late version, which waits for the quiet time in any case: one version for all of them.
    """
    images = [image for image in study.images if not image.ignored]
    uids = tuple(sorted(image.sop_uid for image in images))
    is_quiet = now - study.last_arrival >= rules.quiet_seconds and not study.open_transfers
    is_overdue = now - study.first_arrival >= rules.max_seconds
    if not (is_quiet or is_overdue or (_has_standard_views(images) and not study.open_transfers and not study.scored)):
        return Decision("wait", _waiting_for(study))
    if not images:
        reasons = sorted({image.ignored for image in study.images})
        return Decision("ignored", "; ".join(reasons))
    if set(uids) <= study.scored:
        return Decision("ignored", "no new image")
    patients = {image.patient_id for image in images}
    if len(patients) > 1:
        return Decision("refused", f"its images state {len(patients)} patients; correct the headers and send it again")
    if len(images) > rules.max_images:
        return Decision("refused", f"it has {len(images)} images, more than {rules.max_images}")
    if study.scored:
        return Decision("late", f"{len(set(uids) - study.scored)} images arrived after the last version", uids)
    if is_overdue and not is_quiet:
        return Decision("forced", f"objects were still arriving after {rules.max_seconds:g} s", uids)
    views = "the four standard views are there" if _has_standard_views(images) else "nothing arrived in the quiet time"
    return Decision("ready", views, uids)


def _has_standard_views(images: Sequence[ImageFacts]) -> bool:
    return {(image.side, image.view) for image in images} >= STANDARD_VIEWS


def _waiting_for(study: StudyFacts) -> str:
    if study.open_transfers:
        return f"{study.open_transfers} open associations"
    return "the quiet time"
