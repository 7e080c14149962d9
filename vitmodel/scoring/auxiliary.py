"""The auxiliary outputs of an ensemble: columns of the score tables, and their agreement with a manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from vitmodel.config.auxiliary import AuxiliaryTarget, count_outputs, output_slices
from vitmodel.data.manifest import breast_ids
from vitmodel.metrics.auxiliary import AuxiliaryOutput, measure
from vitmodel.metrics.multiclass import AuxiliaryMetrics, Bootstrap, SoftmaxCalibration
from vitmodel.metrics.scored_units import FloatArray, mean_logits

KNOWN_COLUMNS = ("view", "age")
"""Targets that are facts on the image or the patient; their predictions get the prefix `predicted_`."""


def load_outputs(targets: Sequence[AuxiliaryTarget], package: Mapping[str, Any]) -> dict[str, AuxiliaryOutput]:
    """Return the auxiliary outputs of a package by name.

    Args:
        targets: The targets of the package's network.
        package: The contents of config.json.
    """
    fitted = package["auxiliary"] if targets else {}
    calibrations = {name: values and SoftmaxCalibration.from_dict(values) for name, values in fitted.items()}
    return {target.name: AuxiliaryOutput(target, calibrations[target.name]) for target in targets}


@dataclass(frozen=True)
class AuxiliaryEnsemble:
    """The auxiliary outputs of M packages, of which each may have other ones.

    Shapes: N units, A outputs of the heads of all packages, C classes.
    """

    members: tuple[Mapping[str, AuxiliaryOutput], ...]
    """The outputs of each package by name."""

    @property
    def targets(self) -> list[AuxiliaryTarget]:
        """The targets of all packages, each once."""
        return list({name: output.target for member in self.members for name, output in member.items()}.values())

    @property
    def count(self) -> int:
        """The number of outputs A."""
        return count_outputs(self.targets)

    def align(self, outputs: np.ndarray, member: int) -> np.ndarray:
        """Return the outputs of one package at their positions among those of all; NaN where it has no such head.

        Args:
            outputs: The package's own outputs, `(N, K)`.
            member: Position of the package.
        """
        own = {
            target.name: outputs[:, columns]
            for target, columns in output_slices([output.target for output in self.members[member].values()])
        }
        aligned = np.full((len(outputs), self.count), np.nan)
        for target, columns in output_slices(self.targets):
            if target.name in own:
                aligned[:, columns] = own[target.name]
        return aligned

    def predictions(self, outputs: FloatArray, level: str) -> Iterator[tuple[AuxiliaryTarget, FloatArray]]:
        """Yield each target of units of a level, with its probabilities `(N, C)` or numbers `(N, 1)`.

        They are the means over the packages that have the head. Images have predictions of all targets.

        Args:
            outputs: `(N, A, M)`.
            level: "image" or "breast".
        """
        for target, columns in output_slices(self.targets):
            if level in ("image", target.level):
                predicted = [
                    member[target.name].predict(outputs[:, columns, number])
                    for number, member in enumerate(self.members)
                    if target.name in member
                ]
                yield target, np.mean(predicted, axis=0)

    def columns(self, outputs: FloatArray, level: str, index: pd.Index) -> pd.DataFrame:
        """Return the columns of the score table for N units.

        A target with classes has a column per class (`density_A`) and its most probable class (`density`), a flag its
        probability (`invasive_probability`), and a number its value (`predicted_age`).

        Args:
            outputs: `(N, A, M)`.
            level: "image" or "breast".
            index: Index of the rows.
        """
        columns: dict[str, Any] = {}
        for target, predicted in self.predictions(outputs, level):
            prediction_name = f"predicted_{target.name}" if target.name in KNOWN_COLUMNS else target.name
            if target.classes:
                for name, values in zip(target.classes, predicted.T, strict=True):
                    columns[f"{target.name}_{name}"] = values
                columns[prediction_name] = np.array(target.classes, dtype=object)[predicted.argmax(axis=1)]
            elif target.scale:
                columns[prediction_name] = predicted[:, 0]
            else:
                columns[f"{target.name}_probability"] = predicted[:, 1]
        return pd.DataFrame(columns, index=index)

    def breast_outputs(self, outputs: FloatArray, breasts: pd.Series) -> tuple[FloatArray, pd.Index]:
        """Return the mean outputs of each breast, `(G, A, M)`, and the sorted ids of the breasts.

        Args:
            outputs: Outputs for N images, `(N, A, M)`.
            breasts: The breast of each image, `(N,)`.
        """
        ids = np.unique(breasts)
        means = mean_logits(outputs.reshape(len(outputs), -1), breasts) if self.count else np.empty((len(ids), 0))
        return means.reshape(len(ids), self.count, len(self.members)), pd.Index(ids)

    def metrics(
        self, table: pd.DataFrame, outputs: FloatArray, bootstrap: Bootstrap
    ) -> dict[AuxiliaryTarget, AuxiliaryMetrics | None]:
        """Return the agreement of each target with the known values of a manifest; None if no value is known.

        The value of a breast is the largest known value of its images.

        Args:
            table: The manifest's rows of N scored images.
            outputs: Outputs for these images, `(N, A, M)`.
            bootstrap: Settings of the intervals.
        """
        ids = breast_ids(table)
        means, breasts = self.breast_outputs(outputs, ids)
        owners = {"image": table["patient_id"], "breast": table["patient_id"].groupby(ids.to_numpy()).first()}
        predicted_by_level = {
            level: {target.name: predicted for target, predicted in self.predictions(values, level)}
            for level, values in (("image", outputs), ("breast", means))
        }
        result = {}
        for target in self.targets:
            labels = pd.Series(target.encode(table[target.name].tolist()), dtype=float)
            if target.level == "breast":
                labels = labels.groupby(ids.to_numpy()).max().loc[breasts]
            predicted = predicted_by_level[target.level][target.name]
            patients = owners[target.level].to_numpy()
            result[target] = measure(target, labels.to_numpy(), predicted, patients, bootstrap)
        return result
