"""The network that a training starts from: its size, its optional parts and its initial weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
import yaml

from vitmodel.config import Preprocessing, Size, TrainConfig, TrainingConfig, listed
from vitmodel.config.auxiliary import AUXILIARY_TARGETS
from vitmodel.data.exams import build_vocabulary
from vitmodel.errors import UsageError
from vitmodel.hub.aliases import ALIASES
from vitmodel.hub.names import weights_name
from vitmodel.model.architecture import (
    PRESETS,
    ExamConfig,
    NetworkConfig,
    SourcesConfig,
    ViTConfig,
    whole_patches,
)
from vitmodel.model.low_rank import add_low_rank_updates
from vitmodel.model.network import Network
from vitmodel.model.pretrained import preset_of
from vitmodel.model.weight_source import WeightsSource, find_weights, weights_source
from vitmodel.model.weights import WeightAction, WeightReport, fit_weights, load_weights
from vitmodel.training.losses import prior_bias

logger = logging.getLogger(__name__)

RECIPES_OF_RUNS = ("train.yaml", "tune.yaml")
"""Names of the recipe in a run folder."""
TrainerConfig = TypeVar("TrainerConfig", bound=TrainConfig)


def settle_network(config: TrainerConfig, preprocessing: Preprocessing) -> tuple[TrainerConfig, WeightsSource | None]:
    """Return the configuration with the size of the network and the exact revision of --weights, and their source.

    Names of weights are replaced by their repository at a commit, so that folds, resumed runs and the recipe in the run
    folder use the same weights, whatever happens to the repository meanwhile.

    Args:
        config: Settings of the training.
        preprocessing: Preprocessing of the crops.

    Raises:
        UsageError: There are no weights of this name, no preset fits them, or patches do not fill the crops.
        VitmodelError: The weights cannot be downloaded or read.
    """
    alias = ALIASES.get(str(config.weights).partition("@")[0])
    if config.model == "auto" and alias and weights_name(str(config.weights)):
        config = _with_model(config, alias.preset)  # known before the download
    if config.model != "auto":
        _check_patches(config, preprocessing.size)
    if config.weights is None:
        return config, None
    path, name = find_weights(_weights_of_run(config) or config.weights)
    if name is not None:
        config = replace(config, weights=Path(str(name)))
    if config.model == "auto":
        model = preset_of(load_weights(path))
        logger.info("model: %s, which fits %s", model, config.weights)
        config = _with_model(config, model)
        _check_patches(config, preprocessing.size)
    return config, weights_source(path, name)


def _weights_of_run(config: TrainConfig) -> Path | None:
    """Return the weights of the run that is resumed, at their commit, if `config` names them without a revision."""
    name = weights_name(config.weights or "")
    recipe = next((path for path in config.run.glob("t*.yaml") if path.name in RECIPES_OF_RUNS), None)
    if not config.resume or name is None or name.revision or recipe is None:
        return None
    started = yaml.safe_load(recipe.read_text())["weights"]
    return Path(started) if str(started).startswith(f"{name}@") else None


def _with_model(config: TrainerConfig, model: str) -> TrainerConfig:
    settings: dict[str, Any] = {"model": model}
    return replace(config, **settings)


def _check_patches(config: TrainConfig, size: Size) -> None:
    """Raise UsageError if the patches of the network do not fill crops of `size`; segments have a size of their own."""
    patch = PRESETS[config.model].patch
    suited = whole_patches(size, patch)
    if not config.segments and suited != size:
        raise UsageError(
            f"{listed(config.manifest)}: crops of {size} are not whole patches of {patch}x{patch} pixels, as "
            f"{config.model} needs; make them with `vitmodel etl --size {suited}`, or choose another --model"
        )


def make_vit_config(config: TrainingConfig, size: Size) -> ViTConfig:
    """Return the preset with the changes of the recipe, for crops of `size`."""
    return replace(
        PRESETS[config.model], image_size=size, pool=config.pool, stem=config.stem, drop_path=config.drop_path
    )


def make_network_config(
    config: TrainConfig, preprocessing: Preprocessing, trainings: Sequence[pd.DataFrame]
) -> NetworkConfig:
    """Return the configuration of the whole network: the preset with source adapters, exam fusion and segments.

    Args:
        config: Settings of the training.
        preprocessing: Preprocessing of the crops; gives the image size unless segments are used.
        trainings: The training rows of each fold. A source or view gets parameters of its own if each of them has at
            least `config.source_images` images of it.
    """
    size = Size(config.segments, config.segments) if config.segments else preprocessing.size
    names = dict.fromkeys([*config.sources, *(["view"] if config.fusion else [])])
    vocabularies = {column: build_vocabulary(column, trainings, config.source_images) for column in names}
    columns = tuple(vocabularies[column] for column in config.sources)
    views = vocabularies.get("view")
    return NetworkConfig(
        vit=make_vit_config(config, size),
        sources=SourcesConfig(columns=columns) if columns else None,
        exam=ExamConfig(views=views, asymmetry=config.asymmetry) if config.fusion and views else None,
        segments=config.segmenting,
        auxiliary=tuple(AUXILIARY_TARGETS[name] for name in config.auxiliary),
    )


def build_model(
    config: TrainConfig, network: NetworkConfig, train: pd.DataFrame
) -> tuple[Network, WeightReport | None]:
    """Return the network, initialised with `config.weights` if given, and what was done with each of their tensors.

    The table of these is printed. The head's bias starts at the share of positives that the sampler produces.

    Args:
        config: Settings of the training.
        network: Configuration of the network.
        train: The training rows.
    """
    weights = load_weights(config.weights) if config.weights is not None else None
    if weights is not None and weights.eps is not None:
        network = replace(network, vit=replace(network.vit, eps=weights.eps))
    model = Network(network)
    model.trunk.gradient_checkpointing = config.checkpointing
    prior = 0.5 if config.sampling == "balanced" else float(train[config.label].mean())
    torch.nn.init.constant_(model.trunk.head.bias, prior_bias(prior))
    if weights is not None:
        report = fit_weights(model.trunk, weights)
        trunk_tensors = model.trunk.state_dict()
        fresh = [WeightAction("fresh", name) for name in model.tensors() if name not in trunk_tensors]
        if config.lora:
            add_low_rank_updates(model.trunk, config.lora, report.tensors_by_action("fresh"))
        report = replace(report, actions=(*report.actions, *fresh))
        print(report)
        return model, report
    return model, None
