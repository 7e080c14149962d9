"""One model package at work: its models, calibration and threshold, and what it says of images that are cut into patches. Knows no
other package, no image file and no table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitmodel.config import PredictorConfig, Preprocessing
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.metrics import calibration
from vitmodel.model.onnx import load_encoder, load_onnx
from vitmodel.model.package import CONFIG_FILE, TENSORS_FILE, load_models
from vitmodel.model.packed_batch import PackedBatch, split_by_token_budget
from vitmodel.model.segments import SegmentAggregator
from vitmodel.utils import sha256_file


class LoadedPackage:
    """One package of those that score together; it may itself hold the models of several folds, which share a calibration.

    Raises VitmodelError naming the package where it cannot be used, UsageError where it was only pretrained.
    """

    def __init__(self, folder: Path, config: PredictorConfig, device: torch.device) -> None:
        self.folder = folder
        self.models, self.package = load_models(folder)
        if "label" not in self.package:
            raise UsageError(
                f"{folder}: holds pretrained weights that give no score; train on labels with `--weights` first"
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
            fitted = dict(self.package["calibration"])
            self.calibration_level: str = fitted.pop(
                "level", "image"
            )  # a package without the word was calibrated image by image
            self.calibration = calibration.from_dict(fitted)
            self.threshold: float = self.package["decision"]["threshold"]
            self.aggregation: str = self.package["decision"]["aggregate"]
            self.label: str = self.package["label"]
        except KeyError as error:
            raise VitmodelError(
                f"{folder / CONFIG_FILE}: {error} is missing; use the vitmodel that wrote it, or train anew"
            ) from error
        except UsageError as error:
            raise VitmodelError(f"{folder / CONFIG_FILE}: {error}; a newer vitmodel wrote it, install that") from error
        self.packed: bool = self.package.get("packed", False)  # a package without the word was trained with all air
        self.flip: bool = self.package.get("flip", False) if config.flip is None else config.flip
        self.tokens = config.tokens
        network = self.models[0]
        self.is_single_graph = not (
            network.sources or network.exam or network.segments or self.preprocessing.mm_per_pixel
        )
        """Whether its models are plain ViTs for crops of one size, which one ONNX graph holds from pixels to their mean logits."""
        self.onnx: list[Path] = []
        self.runtime_models = self.models
        if config.runtime != "torch":
            self.use_onnx(config.runtime, folder / f"model.{config.precision}.onnx")

    def onnx_paths(self, path: Path) -> list[Path]:
        """Where its graphs lie: in `path` or, if it has several models and each has a graph of its own, in one numbered after another."""
        more = 0 if self.is_single_graph else len(self.models) - 1
        return [path, *(path.with_suffix(f".{number + 1}{path.suffix}") for number in range(more))]

    def use_onnx(self, runtime: str, path: Path) -> None:
        """From now on compute by ONNX in `path`; explanations stay with PyTorch. Raises as `runtime.load_onnx` does."""
        self.onnx, weights = self.onnx_paths(path), sha256_file(self.folder / TENSORS_FILE)
        if self.is_single_graph:
            self.onnx_session = load_onnx(path, runtime, weights)
        else:
            encoders = [load_encoder(each, runtime, weights) for each in self.onnx]
            self.runtime_models = [
                model.with_encoder(encode) for model, encode in zip(self.models, encoders, strict=True)
            ]

    def logits(self, images: PackedBatch) -> np.ndarray:
        """What the package says of each of the pack's B images and, with the fusion of exams, of its breast, the mean over its folds: B L.

        Of an exam that exceeds the budget of tokens, some images after the other are seen, and what was seen is fused.
        """
        if self.onnx and self.is_single_graph:
            return self.onnx_session(images)[:, :1].float().cpu().numpy()
        said = []
        for model in self.runtime_models:
            features = torch.cat(
                [
                    model.features(part)
                    for part in split_by_token_budget(images, self.tokens, model.config.vit.num_prefix_tokens)
                ]
            )
            said.append(model.image_and_breast_logits(features, images.metadata).float().cpu().numpy())
        return np.mean(said, axis=0)

    @property
    def shared_settings(self) -> dict[str, Any]:
        """What the members must share, because each image is decoded, cropped and cut into patches once."""
        network = self.models[0].config
        return {
            "label": self.label,
            "values of its sources": network.sources and network.sources.columns,
            "views of its fusion": network.exam and network.exam.views,
            "preprocessing": self.preprocessing,
            "packed": self.packed,
            "flip averaging": self.flip,
            "patch": self.models[0].config.vit.patch,
            "registers": self.models[0].config.vit.registers,
            "aggregate": self.aggregation,
        }
