"""A loaded model package: its models, its calibration and threshold, and what it computes from packed images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitmodel.config import PredictorConfig, Preprocessing
from vitmodel.config.labels import CANCER
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.metrics import calibration
from vitmodel.metrics.calibration_band import CalibrationBand
from vitmodel.model.onnx import load_encoder, load_onnx
from vitmodel.model.package import CONFIG_FILE, TENSORS_FILE, load_models, load_typicalities
from vitmodel.model.package_check import check_graph
from vitmodel.model.packed_batch import PackedBatch, split_by_token_budget
from vitmodel.model.segments import SegmentAggregator
from vitmodel.model.shared_package import find_package
from vitmodel.scoring.auxiliary import load_outputs
from vitmodel.utils import sha256_file


def trained_label(package: dict[str, Any]) -> str:
    """Return the label rule in a package's config.json; packages without this key were trained on cancer."""
    return str(package.get("label", CANCER))


class LoadedPackage:
    """A loaded package of an ensemble. It may hold the models of several folds, which share one calibration.

    Args:
        folder: Folder of the package, or its name on the hub.
        config: The runtime, the token budgets and whether to average over flips.
        device: Device of the models.

    Raises:
        VitmodelError: The package cannot be used; the message names its folder.
        UsageError: The package was only pretrained, or `config` does not fit it.
    """

    def __init__(self, folder: Path, config: PredictorConfig, device: torch.device) -> None:
        folder, self.hub_name = find_package(folder)
        self.folder = folder
        self.models, self.package = load_models(folder)
        if not {"label", "calibration", "decision"} & self.package.keys():
            raise UsageError(
                f"{folder}: holds pretrained weights, which give no scores; train with `--weights {folder}` first"
            )
        for model in self.models:
            model.to(device)
            if isinstance(model.segments, SegmentAggregator) and config.segment_budget:
                model.segments.set_token_budget(config.segment_budget)
        if config.segment_budget and not self.models[0].segments:
            raise UsageError(
                f"segment_budget: has no effect on {folder}, which was trained without --segments; leave it out"
            )
        try:
            self.preprocessing = Preprocessing.from_json(self.package["preprocessing"])
            if config.implausible != "package":
                self.preprocessing = replace(self.preprocessing, implausible=config.implausible)
            fitted = dict(self.package["calibration"])
            # Packages without this key were calibrated per image.
            self.calibration_level: str = fitted.pop("level", "image")
            self.calibration = calibration.from_dict(fitted)
            # Packages of earlier versions, and of trainings with too few patients, have no band.
            band = self.package.get("calibration_band")
            self.calibration_band = CalibrationBand.from_dict(band) if band else None
            self.threshold: float = self.package["decision"]["threshold"]
            self.aggregation: str = self.package["decision"]["aggregate"]
            self.auxiliary = load_outputs(self.models[0].config.auxiliary, self.package)
        except KeyError as error:
            raise VitmodelError(
                f"{folder / CONFIG_FILE}: {error} is missing; use the version of vitmodel that wrote it, or train again"
            ) from error
        except UsageError as error:
            raise VitmodelError(
                f"{folder / CONFIG_FILE}: {error}; a newer vitmodel wrote it: install that version"
            ) from error
        self.label = trained_label(self.package)
        self.packed: bool = self.package.get("packed", False)  # packages without this key were trained with all air
        self.flip: bool = self.package.get("flip", False) if config.flip is None else config.flip
        self.tokens = config.tokens
        network = self.models[0]
        self.is_single_graph = not (
            network.sources or network.exam or network.segments or self.preprocessing.mm_per_pixel
        )
        """Whether the models are plain ViTs for one crop size. One ONNX graph then maps pixels to their mean logits."""
        self.typicalities = load_typicalities(folder) if config.runtime == "torch" else []
        """Typicality of each model; empty if the package has none or another runtime hides the blocks."""
        self.onnx: list[Path] = []
        self.runtime_models = self.models
        if config.runtime != "torch":
            path = folder / f"model.{config.precision}.onnx"
            for file in self.onnx_paths(path):
                check_graph(folder, file)
            self.use_onnx(config.runtime, path)

    def onnx_paths(self, path: Path) -> list[Path]:
        """Return the files of the ONNX graphs: `path` and, if each of several models has a graph, numbered files."""
        count = 1 if self.is_single_graph else len(self.models)
        return [path, *(path.with_suffix(f".{number}{path.suffix}") for number in range(1, count))]

    def use_onnx(self, runtime: str, path: Path) -> None:
        """Compute logits with the ONNX file `path` from now on; explanations still use PyTorch.

        Raises the errors of `vitmodel.model.onnx.load_onnx`.
        """
        self.onnx = self.onnx_paths(path)
        self.typicalities = []
        weights = sha256_file(self.folder / TENSORS_FILE)
        if self.is_single_graph:
            self.onnx_session = load_onnx(path, runtime, weights)
        else:
            encoders = [load_encoder(file, runtime, weights) for file in self.onnx]
            self.runtime_models = [
                model.with_encoder(encode) for model, encode in zip(self.models, encoders, strict=True)
            ]

    def logits(self, images: PackedBatch) -> np.ndarray:
        """Return the outputs `(B, L + K)` for B images; see `judge`."""
        return self.judge(images)[0]

    def judge(self, images: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
        """Return the outputs `(B, L + K)` for B images, the mean over the folds, and their typicality `(B,)`.

        The first L outputs are the logits of the image and, with exam fusion, of its breast; the others are those of
        the auxiliary heads. Typicality is the geometric mean over the folds, NaN if it is unavailable.

        The images of an exam that exceeds the token budget are encoded in parts; fusion then uses all their features.
        """
        if self.onnx and self.is_single_graph:
            mean = self.onnx_session(images).float().cpu().numpy()
            first = np.delete(mean, slice(1, self.models[0].config.vit.classes), axis=1)
            return first, np.full(len(images), np.nan)
        logits = []
        log_typicality = np.zeros(len(images)) if self.typicalities else np.full(len(images), np.nan)
        for number, model in enumerate(self.runtime_models):
            parts = split_by_token_budget(images, self.tokens, model.config.vit.num_prefix_tokens)
            encoded = [model.features_and_depths(part) for part in parts]
            features = torch.cat([part for part, _ in encoded])
            if self.typicalities:
                depths = torch.cat([part for _, part in encoded if part is not None]).cpu().numpy()
                log_typicality += np.log(self.typicalities[number](depths)) / len(self.runtime_models)
            outputs = [model.image_and_breast_logits(features, images.metadata), model.auxiliary_outputs(features)]
            logits.append(torch.cat(outputs, dim=1).float().cpu().numpy())
        return np.mean(logits, axis=0), np.exp(log_typicality)

    @property
    def shared_settings(self) -> dict[str, Any]:
        """Return the settings that all packages of an ensemble must share.

        Each image is decoded, cropped and cut into patches once for all of them. The keys are names for messages.
        """
        network = self.models[0].config
        return {
            "label": self.label,
            "values of its sources": network.sources and network.sources.columns,
            "views of its fusion": network.exam and network.exam.views,
            "preprocessing": self.preprocessing,
            "packed": self.packed,
            "flip averaging": self.flip,
            "patch": network.vit.patch,
            "registers": network.vit.registers,
            "aggregate": self.aggregation,
        }
