"""What a network is made of: the Vision Transformer's config and presets, and what may stand around it. Knows no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from vitmodel.config import SegmentsConfig, Size, require
from vitmodel.errors import UsageError

IMAGENET_SIZE = Size(224, 224)


def patch_grid(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of `size` (height, width). Raises UsageError where the patches do not fill it exactly."""
    height, width = size
    if min(height, width) < patch:
        raise UsageError(
            f"image_size: {height}x{width} is smaller than a patch of {patch}x{patch} pixels; take larger images"
        )
    if height % patch or width % patch:
        fitting = f"{round(height / patch) * patch}x{round(width / patch) * patch}"
        raise UsageError(
            f"image_size: {height}x{width} is no multiple of the patch, {patch} pixels; resize or pad to, say, {fitting}"
        )
    return height // patch, width // patch


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The sizes and parts of a Vision Transformer: all that is needed to build a `ViT`.

    Raises:
        UsageError: A field has an impossible value.

    Examples:
        >>> vitmodel.ViTConfig(image_size=(64, 32), dim=192, depth=12, heads=3).grid
        (4, 2)
    """

    image_size: Size = IMAGENET_SIZE
    """Height x width for which the positions are learned; other sizes resize them."""
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
    """Hidden width of the MLP over `dim`."""
    classes: int = 1
    """Number of logits."""
    pool: Literal["cls", "mean", "attention"] = "mean"
    """Tokens to features: the class token, the mean of the patches (Beyer et al. 2022, arXiv 2205.01580: better when data are few), or one
    learned query that attends to the patches (Zhai et al. 2022, arXiv 2106.04560)."""
    stem: Literal["linear", "conv"] = "linear"
    """Patches to tokens: one matrix, or early convolutions (Xiao et al. 2021, arXiv 2106.14881)."""
    layer_scale: float | None = None
    """Initial scale of each residual branch (Touvron et al. 2021, arXiv 2103.17239); None = no such parameter."""
    registers: int = 0
    """Extra tokens that hold what belongs to no patch (Darcet et al. 2024, arXiv 2309.16588)."""
    drop_path: float = 0.0
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): chance to skip the last block's branches, growing from 0 at the first."""
    eps: float = 1e-6
    """Added to the variance in layer norms."""

    def __post_init__(self) -> None:
        for name in ("patch", "channels", "dim", "depth", "heads", "classes"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        require(self.dim % self.heads == 0, "heads", f"{self.heads} does not divide dim {self.dim}")
        require(self.mlp_ratio > 0, "mlp_ratio", "must be positive")
        require(self.pool in ("cls", "mean", "attention"), "pool", f"is cls, mean or attention, not {self.pool!r}")
        require(self.stem in ("linear", "conv"), "stem", f"is linear or conv, not {self.stem!r}")
        powers_of_two = self.patch > 1 and self.patch.bit_count() == 1 and 2 * self.dim % self.patch == 0
        require(
            self.stem == "linear" or powers_of_two,
            "stem",
            "conv needs a patch that is a power of two and divides twice the dim",
        )
        require(self.registers >= 0, "registers", "must not be negative")
        require(0 <= self.drop_path < 1, "drop_path", "must lie in [0, 1)")
        patch_grid(self.image_size, self.patch)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        return patch_grid(self.image_size, self.patch)

    @property
    def hidden(self) -> int:
        """Width between the two layers of an MLP."""
        return int(self.dim * self.mlp_ratio)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches: the class token and the registers."""
        return 1 + self.registers

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the way back."""
        return asdict(self) | {"image_size": str(Size(*self.image_size))}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ViTConfig:
        """A config from `to_dict`'s values. Raises UsageError for an unknown, missing or impossible one."""
        if wrong := {field.name for field in fields(cls)} ^ set(values):
            raise UsageError(f"architecture: keys that are unknown or missing: {', '.join(sorted(wrong))}")
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
    # DINO's (Caron et al. 2021, arXiv 2104.14294)
    "vit_small8": ViTConfig(dim=384, depth=12, heads=6, patch=8),
    "vit_base8": ViTConfig(dim=768, depth=12, heads=12, patch=8),
    # DINOv2's (Oquab et al. 2023, arXiv 2304.07193), and with registers
    "vit_small14": ViTConfig(dim=384, depth=12, heads=6, patch=14, layer_scale=1e-5),
    "vit_base14": ViTConfig(dim=768, depth=12, heads=12, patch=14, layer_scale=1e-5),
    "vit_large14": ViTConfig(dim=1024, depth=24, heads=16, patch=14, layer_scale=1e-5),
    "vit_small14_reg4": ViTConfig(dim=384, depth=12, heads=6, patch=14, layer_scale=1e-5, registers=4),
    "vit_base14_reg4": ViTConfig(dim=768, depth=12, heads=12, patch=14, layer_scale=1e-5, registers=4),
    "vit_large14_reg4": ViTConfig(dim=1024, depth=24, heads=16, patch=14, layer_scale=1e-5, registers=4),
}


@dataclass(frozen=True)
class Vocabulary:
    """The values of a column that a network knows apart."""

    column: str
    values: tuple[str, ...]
    """Value number i has the index i + 1; 0 is for everything else."""

    def index(self, value: object) -> int:
        """The index of a value; 0 where it is unknown or not among those known apart."""
        text = self.text(value)
        return self.values.index(text) + 1 if text in self.values else 0

    @staticmethod
    def text(value: object) -> str:
        """5.0 and "5" alike."""
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    def __len__(self) -> int:
        return len(self.values) + 1


@dataclass(frozen=True, kw_only=True)
class SourcesConfig:
    """Which sources of images (machines, views ...) have a part of the trunk of their own, and how large it is."""

    columns: tuple[Vocabulary, ...]
    rank: int = 8
    """Width of each adapter's waist."""
    every: int = 2
    """Before every how many blocks there is one, counted back from the last."""

    def __post_init__(self) -> None:
        require(bool(self.columns), "sources", "names no column")
        for name in ("rank", "every"):
            require(getattr(self, name) >= 1, f"sources.{name}", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ExamConfig:
    """How the images of an exam are integrated."""

    views: Vocabulary
    """The projections that are told apart."""
    depth: int = 2
    """Blocks of the fusion transformer."""
    asymmetry: bool = True
    """Whether a breast's logit also attends to the images of the other breast."""

    def __post_init__(self) -> None:
        require(self.depth >= 1, "exam.depth", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """All that is needed to build a `Network`: the trunk, and what may stand around it."""

    vit: ViTConfig
    sources: SourcesConfig | None = None
    exam: ExamConfig | None = None
    segments: SegmentsConfig | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; without extras those of the ViT alone, so that older packages are read and written as ever."""
        extras = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return self.vit.to_dict() | {name: asdict(config) for name, config in extras.items() if config is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NetworkConfig:
        """A config from `to_dict`'s values. Raises UsageError for an unknown, missing or impossible one."""
        values = dict(values)
        sources, exam, segments = (values.pop(name, None) for name in ("sources", "exam", "segments"))
        vit = ViTConfig.from_dict(values)
        try:
            return cls(
                vit=vit,
                sources=sources and SourcesConfig(**sources | {"columns": tuple(map(_vocabulary, sources["columns"]))}),
                exam=exam and ExamConfig(**exam | {"views": _vocabulary(exam["views"])}),
                segments=segments and SegmentsConfig(**segments),
            )
        except (TypeError, KeyError) as error:
            raise UsageError(f"architecture: {error}") from error


def _vocabulary(values: dict[str, Any]) -> Vocabulary:
    return Vocabulary(values["column"], tuple(values["values"]))
