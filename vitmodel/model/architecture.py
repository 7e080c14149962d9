"""Configurations of networks: the Vision Transformer, its presets, and the optional parts around it.

This module does not import torch, so that the command line can read presets quickly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from vitmodel.config import SegmentsConfig, Size, require
from vitmodel.config.auxiliary import AuxiliaryTarget, count_outputs
from vitmodel.errors import UsageError

IMAGENET_SIZE = Size(224, 224)


def whole_patches(size: tuple[int, int], patch: int) -> Size:
    """Return the size nearest to `size` that patches fill exactly."""
    height, width = (max(1, round(side / patch)) * patch for side in size)
    return Size(height, width)


def patch_grid(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return the rows and columns of patches in an image of `size` (height, width) in pixels.

    Raises:
        UsageError: The patches do not fill the image exactly.
    """
    height, width = size
    if min(height, width) < patch:
        raise UsageError(
            f"image_size: {height}x{width} is smaller than a patch of {patch}x{patch} pixels; use larger images"
        )
    if height % patch or width % patch:
        raise UsageError(
            f"image_size: {height}x{width} is not a multiple of the patch size of {patch} pixels; "
            f"resize or pad the images, for example to {whole_patches(size, patch)}"
        )
    return height // patch, width // patch


def _require_choice(value: str, field: str, choices: tuple[str, ...]) -> None:
    """Raise UsageError unless `value` is one of the choices."""
    require(value in choices, field, f"{value!r} is not a choice; choose from {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes and components of a Vision Transformer: everything needed to build a `ViT`.

    Raises:
        UsageError: A field has an impossible value.

    Examples:
        >>> vitmodel.ViTConfig(image_size=(64, 32), dim=192, depth=12, heads=3).grid
        (4, 2)
    """

    image_size: Size = IMAGENET_SIZE
    """Height and width in pixels for which the position embeddings are learned; they are resized for other sizes."""
    patch: int = 16
    """Side of a patch in pixels."""
    channels: int = 1
    """Input channels."""
    dim: int = 384
    """Width of a token."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 6
    """Attention heads per block."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP divided by `dim`."""
    classes: int = 1
    """Number of logits."""
    pool: Literal["cls", "mean", "attention"] = "mean"
    """How tokens become features: the class token, the mean of the patches (Beyer et al. 2022, arXiv 2205.01580: better
    with little data), or one learned query that attends to the patches (Zhai et al. 2022, arXiv 2106.04560)."""
    stem: Literal["linear", "conv"] = "linear"
    """How patches become tokens: by one matrix, or by early convolutions (Xiao et al. 2021, arXiv 2106.14881)."""
    layer_scale: float | None = None
    """Initial scale of each residual branch (Touvron et al. 2021, arXiv 2103.17239); None = no layer scale."""
    registers: int = 0
    """Number of register tokens, which store information that belongs to no patch (Darcet et al. 2024, arXiv
    2309.16588)."""
    drop_path: float = 0.0
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): probability of skipping a branch of the last block. It
    increases linearly from 0 at the first block."""
    eps: float = 1e-6
    """Constant added to the variance in layer norms."""

    def __post_init__(self) -> None:
        for name in ("patch", "channels", "dim", "depth", "heads", "classes"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        divides = self.dim % self.heads == 0
        require(divides, "heads", f"{self.heads} does not divide dim {self.dim}; choose a divisor of {self.dim}")
        require(self.mlp_ratio > 0, "mlp_ratio", "must be positive")
        _require_choice(self.pool, "pool", ("cls", "mean", "attention"))
        _require_choice(self.stem, "stem", ("linear", "conv"))
        is_power_of_two = self.patch > 1 and self.patch.bit_count() == 1
        fits_conv_stem = is_power_of_two and 2 * self.dim % self.patch == 0
        require(
            self.stem == "linear" or fits_conv_stem,
            "stem",
            f"conv does not fit a patch of {self.patch} and a dim of {self.dim}; "
            "it needs a patch that is a power of two and divides 2 * dim",
        )
        require(self.registers >= 0, "registers", "must not be negative")
        require(0 <= self.drop_path < 1, "drop_path", "must lie in [0, 1)")
        patch_grid(self.image_size, self.patch)

    @property
    def grid(self) -> tuple[int, int]:
        """Return the rows and columns of patches at `image_size`."""
        return patch_grid(self.image_size, self.patch)

    @property
    def hidden(self) -> int:
        """Return the width between the two layers of an MLP."""
        return int(self.dim * self.mlp_ratio)

    @property
    def num_prefix_tokens(self) -> int:
        """Return the number of tokens before the patches: the class token and the registers."""
        return 1 + self.registers

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON; `from_dict` is the inverse."""
        return asdict(self) | {"image_size": str(Size(*self.image_size))}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ViTConfig:
        """Return the config that `to_dict` returned as `values`.

        Raises:
            UsageError: A key is unknown or missing, or a value is impossible.
        """
        if wrong := {field.name for field in fields(cls)} ^ set(values):
            raise UsageError(
                f"architecture: the keys {', '.join(sorted(wrong))} are unknown or missing; "
                "use the values that `ViTConfig.to_dict` returns"
            )
        try:
            return cls(**values | {"image_size": Size.parse(values["image_size"])})
        except (TypeError, ValueError) as error:
            raise UsageError(f"architecture: {error}") from error


PRESETS = {
    "vit_micro": ViTConfig(dim=128, depth=4, heads=4),
    "vit_tiny": ViTConfig(dim=192, depth=12, heads=3),
    "vit_small": ViTConfig(dim=384, depth=12, heads=6),
    "vit_base": ViTConfig(dim=768, depth=12, heads=12),
    "vit_large": ViTConfig(dim=1024, depth=24, heads=16),
    # DINO (Caron et al. 2021, arXiv 2104.14294)
    "vit_small8": ViTConfig(dim=384, depth=12, heads=6, patch=8),
    "vit_base8": ViTConfig(dim=768, depth=12, heads=12, patch=8),
    # DINOv2 (Oquab et al. 2023, arXiv 2304.07193), without and with registers
    "vit_small14": ViTConfig(dim=384, depth=12, heads=6, patch=14, layer_scale=1e-5),
    "vit_base14": ViTConfig(dim=768, depth=12, heads=12, patch=14, layer_scale=1e-5),
    "vit_large14": ViTConfig(dim=1024, depth=24, heads=16, patch=14, layer_scale=1e-5),
    "vit_small14_reg4": ViTConfig(dim=384, depth=12, heads=6, patch=14, layer_scale=1e-5, registers=4),
    "vit_base14_reg4": ViTConfig(dim=768, depth=12, heads=12, patch=14, layer_scale=1e-5, registers=4),
    "vit_large14_reg4": ViTConfig(dim=1024, depth=24, heads=16, patch=14, layer_scale=1e-5, registers=4),
}


@dataclass(frozen=True)
class Vocabulary:
    """The values of a column that a network distinguishes."""

    column: str
    values: tuple[str, ...]
    """`values[i]` has the index `i + 1`; the index 0 means any other value."""

    def index(self, value: object) -> int:
        """Return the index of `value`, 0 if it is unknown or not in the vocabulary."""
        text = self.text(value)
        return self.values.index(text) + 1 if text in self.values else 0

    @staticmethod
    def text(value: object) -> str:
        """Return `value` as text; whole floats lose their fraction, so that 5.0 and "5" are the same value."""
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    def __len__(self) -> int:
        return len(self.values) + 1


@dataclass(frozen=True, kw_only=True)
class SourcesConfig:
    """Image sources (machines, views, ...) that have adapters of their own in the trunk, and the adapters' size."""

    columns: tuple[Vocabulary, ...]
    rank: int = 8
    """Width of each adapter's bottleneck."""
    every: int = 2
    """Number of blocks per adapter, counted back from the last block: 2 = an adapter before every second block."""

    def __post_init__(self) -> None:
        require(bool(self.columns), "sources", "no column is given; name at least one")
        for name in ("rank", "every"):
            require(getattr(self, name) >= 1, f"sources.{name}", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ExamConfig:
    """How the images of an exam are combined."""

    views: Vocabulary
    """The projections that are distinguished."""
    depth: int = 2
    """Number of blocks of the fusion transformer."""
    asymmetry: bool = True
    """Whether a breast's logit also depends on the images of the other breast."""

    def __post_init__(self) -> None:
        require(self.depth >= 1, "exam.depth", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Everything needed to build a `Network`: the trunk and its optional parts."""

    vit: ViTConfig
    sources: SourcesConfig | None = None
    exam: ExamConfig | None = None
    segments: SegmentsConfig | None = None
    auxiliary: tuple[AuxiliaryTarget, ...] = ()
    """Further columns that are predicted from the features of each image."""

    @property
    def auxiliary_outputs(self) -> int:
        """Return the number of outputs of all auxiliary heads."""
        return count_outputs(self.auxiliary)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON.

        Without optional parts these are the values of the ViT alone, which keeps the format of older packages.
        """
        parts = {"sources": self.sources, "exam": self.exam, "segments": self.segments}
        values = self.vit.to_dict() | {name: asdict(part) for name, part in parts.items() if part is not None}
        return values | ({"auxiliary": [asdict(target) for target in self.auxiliary]} if self.auxiliary else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NetworkConfig:
        """Return the config that `to_dict` returned as `values`.

        Raises:
            UsageError: A key is unknown or missing, or a value is impossible.
        """
        values = dict(values)
        sources = values.pop("sources", None)
        exam = values.pop("exam", None)
        segments = values.pop("segments", None)
        auxiliary = values.pop("auxiliary", ())
        vit = ViTConfig.from_dict(values)
        try:
            return cls(
                vit=vit,
                sources=sources and SourcesConfig(**sources | {"columns": tuple(map(_vocabulary, sources["columns"]))}),
                exam=exam and ExamConfig(**exam | {"views": _vocabulary(exam["views"])}),
                segments=segments and SegmentsConfig(**segments),
                auxiliary=tuple(map(_auxiliary_target, auxiliary)),
            )
        except (TypeError, KeyError) as error:
            raise UsageError(f"architecture: {error}") from error


def _vocabulary(values: dict[str, Any]) -> Vocabulary:
    return Vocabulary(values["column"], tuple(values["values"]))


def _auxiliary_target(values: dict[str, Any]) -> AuxiliaryTarget:
    return AuxiliaryTarget(**values | {name: tuple(values[name]) for name in ("classes", "ordinal")})
