"""Auxiliary targets: columns of the manifest that a network predicts in addition to its label."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AuxiliaryTarget:
    """A manifest column that is predicted as an auxiliary target."""

    name: str
    classes: tuple[str, ...] = ()
    """Values of a categorical column, in order. Empty for a flag (0 or 1) or, with `scale`, a number."""
    scale: float = 0.0
    """Unit of a number, chosen so that errors are near 1. 0 if the column is not a number."""
    centre: float = 0.0
    """The target of a number is (value - centre) / scale."""
    ordinal: tuple[str, ...] = ()
    """The classes that have an order, from low to high; empty if none have."""
    level: str = "breast"
    """What the target describes: "image" or "breast"."""

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the target's head."""
        return len(self.classes) or 1

    @property
    def title(self) -> str:
        """Name of the target in reports."""
        return {"birads": "BI-RADS"}.get(self.name, self.name.replace("_", " ").capitalize())

    def encode(self, values: Sequence[object]) -> list[float]:
        """Return the column's values as numbers: class index, 0 or 1, or scaled number.

        Unknown values and values outside the classes are NaN.
        """
        if self.classes:
            index = {name: float(number) for number, name in enumerate(self.classes)}
            return [index.get(_text(value), math.nan) for value in values]
        numbers = [math.nan if value is None else float(value) for value in values]  # type: ignore[arg-type]
        return [(number - self.centre) / self.scale for number in numbers] if self.scale else numbers


def _text(value: object) -> str:
    """Return the text of a value, the same for 5.0 and "5"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


AUXILIARY_TARGETS: Mapping[str, AuxiliaryTarget] = {
    target.name: target
    for target in (
        # BI-RADS 0 asks for further images and has no place in the order.
        AuxiliaryTarget("birads", classes=("0", "1", "2", "3", "4", "5", "6"), ordinal=("1", "2", "3", "4", "5", "6")),
        AuxiliaryTarget("density", classes=("A", "B", "C", "D"), ordinal=("A", "B", "C", "D")),
        AuxiliaryTarget("invasive"),
        AuxiliaryTarget("biopsy"),
        AuxiliaryTarget("difficult_negative_case"),
        AuxiliaryTarget("view", classes=("CC", "MLO"), level="image"),
        AuxiliaryTarget("age", centre=58.0, scale=12.0),  # years: mean and standard deviation of a screened population
    )
}


def count_outputs(targets: Sequence[AuxiliaryTarget]) -> int:
    """Return the number of outputs of the heads of all targets together."""
    return sum(target.num_outputs for target in targets)


def output_slices(targets: Sequence[AuxiliaryTarget]) -> Iterator[tuple[AuxiliaryTarget, slice]]:
    """Yield each target with the positions of its outputs among those of all targets."""
    start = 0
    for target in targets:
        yield target, slice(start, start + target.num_outputs)
        start += target.num_outputs
