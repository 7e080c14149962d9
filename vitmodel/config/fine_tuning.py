"""Options of fine-tuning, and the defaults that depend on how much of the network is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vitmodel.config.base import Config, FreezeEpochs, Needs, require

AUTO = -1
"""Marks a value to be replaced by the default, which depends on --weights, --lora and --freeze."""
AUTOMATIC_FREEZE = FreezeEpochs(AUTO)
FROM_SCRATCH = {
    "epochs": 30,
    "lr": 3e-4,
    "layer_decay": 1.0,
    "batch_size": 32,
    "freeze": FreezeEpochs(0),
    "flip_average": False,
}
# The best recipe of benchmarks/recipe.py (dev/LOG.md), except for sampling: half of the images there show a cancer.
FROM_WEIGHTS = {
    "epochs": 6,
    "lr": 1e-4,
    "layer_decay": 0.75,
    "batch_size": 16,
    "freeze": FreezeEpochs(1),
    "flip_average": True,
}
# New parameters start at zero or at random, so they need a larger rate; frozen layers need no decay by layer.
FROM_FROZEN = {**FROM_WEIGHTS, "lr": 1e-3, "layer_decay": 1.0}


def automatic_default(name: str, weights: bool) -> str:
    """Return the default of an option of `FROM_SCRATCH` in words.

    Args:
        name: The option.
        weights: Whether the verb has the option --weights, which changes the default.
    """
    scratch = _in_words(FROM_SCRATCH[name])
    if not weights:
        return scratch
    words = f"{_in_words(FROM_WEIGHTS[name])} with --weights, else {scratch}"
    if FROM_FROZEN[name] != FROM_WEIGHTS[name]:
        words = f"{_in_words(FROM_FROZEN[name])} with --lora or --freeze backbone, {words}"
    return words


def _in_words(value: bool | float) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}"


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig(Config):
    """Which parameters of the network are trained, and the search for a learning rate."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"optimisation": ("freeze", "lora", "find_lr")}
    NEEDS: ClassVar[Mapping[str, Needs]] = {
        "lora": Needs("--weights", lambda config: config.weights is not None),
    }
    DEFAULTS: ClassVar[Mapping[str, str]] = {"freeze": automatic_default("freeze", weights=True)}

    freeze: FreezeEpochs = AUTOMATIC_FREEZE
    """Number of initial epochs in which the backbone is frozen and only the heads learn. backbone = all epochs, a
    linear probe; -1 = the default."""
    lora: int = 0
    """Rank of low-rank updates (LoRA) of the matrices in the blocks, such as 8. The backbone keeps its weights; the
    updates, the heads and newly initialised parts learn. The package holds the sums. 0 = train all weights."""
    find_lr: bool = False
    """Write RUN/find_lr.png, a sweep of the learning rate over about 100 steps, and print a suggestion for --lr instead
    of training."""

    def _default_values(self) -> dict[str, Any]:
        """Return the defaults that depend on --weights, --lora and --freeze."""
        if getattr(self, "weights", None) is None:
            return FROM_SCRATCH
        return FROM_FROZEN if self.lora or self.freeze.is_backbone else FROM_WEIGHTS

    def _check(self) -> None:
        super()._check()
        require(self.freeze >= 0, "freeze", "must not be negative; write backbone to freeze it in all epochs")
        require(self.lora >= 0, "lora", "must not be negative")
        require(
            not (self.lora and self.freeze.is_backbone), "lora", "has no effect with --freeze backbone; leave one out"
        )
