"""When a study is complete."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitmodel.node.gathering import Decision, GatheringRules, ImageFacts, StudyFacts, decide

RULES = GatheringRules(quiet_seconds=60, max_seconds=600)
FOUR = tuple(
    ImageFacts(sop_uid=f"1.{number}", side=side, view=view, patient_id="P")
    for number, (side, view) in enumerate([("R", "MLO"), ("L", "CC"), ("L", "MLO"), ("R", "CC")])
)
STUDY = StudyFacts(images=FOUR, first_arrival=0, last_arrival=1)
OWN = ImageFacts(sop_uid="1.9", ignored="own result")


def test_four_views_are_ready_at_once() -> None:
    assert decide(STUDY, 1, RULES) == Decision(
        "ready", "the four standard views are there", ("1.0", "1.1", "1.2", "1.3")
    )


def test_nothing_is_ready_while_an_association_is_open() -> None:
    assert decide(replace(STUDY, open_transfers=1), 599, RULES).verdict == "wait"


def test_an_incomplete_study_waits_for_the_quiet_time() -> None:
    study = replace(STUDY, images=FOUR[:3])
    assert decide(study, 60.9, RULES).verdict == "wait"
    assert decide(study, 61, RULES).verdict == "ready"


def test_a_study_that_never_ends_is_forced() -> None:
    study = replace(STUDY, images=FOUR[:2], last_arrival=599, open_transfers=2)
    assert decide(study, 599, RULES).verdict == "wait"
    assert decide(study, 600, RULES).verdict == "forced"


def test_a_late_image_gives_one_version_after_the_quiet_time() -> None:
    study = replace(STUDY, scored=frozenset({"1.0", "1.1", "1.2"}))
    assert decide(study, 2, RULES).verdict == "wait"
    late = decide(study, 61, RULES)
    assert late.verdict == "late"
    assert len(late.images) == 4


def test_results_that_come_back_give_no_version() -> None:
    study = replace(STUDY, images=(*FOUR, OWN), scored=frozenset(image.sop_uid for image in FOUR))
    assert decide(study, 61, RULES) == Decision("ignored", "no new image")


def test_a_study_without_mammograms_is_ignored_with_its_reasons() -> None:
    study = replace(STUDY, images=(OWN, ImageFacts(sop_uid="1.8", ignored="modality CT")))
    assert decide(study, 61, RULES) == Decision("ignored", "modality CT; own result")


def test_images_of_two_patients_are_refused() -> None:
    mixed = (*FOUR[:3], replace(FOUR[3], patient_id="Q"))
    decision = decide(replace(STUDY, images=mixed), 61, RULES)
    assert decision.verdict == "refused"
    assert decision.images == ()


def test_a_study_with_too_many_images_is_refused() -> None:
    assert decide(STUDY, 61, replace(RULES, max_images=3)).verdict == "refused"


images = st.lists(
    st.builds(
        ImageFacts,
        sop_uid=st.integers(0, 9).map(str),
        side=st.sampled_from("LR"),
        view=st.sampled_from(["CC", "MLO"]),
        patient_id=st.sampled_from(["P", "P", "P", "Q"]),
        ignored=st.sampled_from(["", "", "own result"]),
    ),
    min_size=1,
    unique_by=lambda image: image.sop_uid,
)


@given(images, st.integers(0, 3), st.frozensets(st.integers(0, 9).map(str)), st.integers(0, 100))
def test_every_study_is_decided_on_in_the_end_and_ignored_objects_are_never_scored(
    objects: list[ImageFacts], transfers: int, scored: frozenset[str], last: int
) -> None:
    study = StudyFacts(images=objects, first_arrival=0, last_arrival=last, open_transfers=transfers, scored=scored)
    assert decide(study, 600, RULES).verdict != "wait"
    for now in (last, last + 59, last + 60, 600):
        decision = decide(study, now, RULES)
        by_uid = {image.sop_uid: image for image in objects}
        assert not any(by_uid[uid].ignored for uid in decision.images)
        assert list(decision.images) == sorted(decision.images)
        assert bool(decision.images) == (decision.verdict in ("ready", "forced", "late"))
        if transfers and now < 600:
            assert decision.verdict == "wait"


@pytest.mark.parametrize("views", [FOUR, FOUR[:1]])
def test_a_second_decision_on_the_same_images_gives_no_job(views: tuple[ImageFacts, ...]) -> None:
    study = replace(STUDY, images=views)
    first = decide(study, 61, RULES)
    assert decide(replace(study, scored=frozenset(first.images)), 700, RULES).images == ()
