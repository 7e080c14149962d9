"""Read the functional groups of a one-frame enhanced DICOM object as if they were tags of the image itself."""

from __future__ import annotations

from pydicom import Dataset
from pydicom.sequence import Sequence

GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
"""Sequences of functional groups; the values of the frame take precedence (DICOM PS3.3 C.7.6.16)."""
RENAMED = {"FrameLaterality": "ImageLaterality"}
"""Tag of a functional group -> tag of a plain image with the same meaning."""


def promote_functional_groups(dataset: Dataset) -> None:
    """Copy the tags of the first frame's functional groups (window, spacing, side) to `dataset`, unless it has them."""
    for name in GROUPS:
        for group in list(dataset.get(name) or [])[:1]:
            for macro in group:
                if isinstance(macro.value, Sequence) and len(macro.value) == 1:
                    _copy_missing(macro.value[0], dataset)


def _copy_missing(source: Dataset, target: Dataset) -> None:
    """Copy the elements of `source` that `target` lacks or has without a value."""
    for element in source:
        if element.tag not in target or target[element.tag].is_empty:
            target.add(element)
        plain = RENAMED.get(element.keyword)
        if plain and not target.get(plain):
            setattr(target, plain, element.value)
