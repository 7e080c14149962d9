"""The whole network: a Vision Transformer and its optional parts.

These are segments, source adapters, exam fusion and auxiliary heads.

Without optional parts the network is the ViT alone: the same numbers, and the same tensors under the same names in a
package.

Symbols in shapes: `I` images of a pack, `D` width of a token, `K` classes, `A` auxiliary outputs, `G` breasts, `E`
exams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitmodel.config.auxiliary import AuxiliaryTarget, count_outputs
from vitmodel.model import packed_attention
from vitmodel.model.architecture import NetworkConfig
from vitmodel.model.fusion import ExamFusion, SourceAdaptedLayout, SourceAdapters, group_by_breast, noisy_or_logits
from vitmodel.model.packed_attention import PackedLayout
from vitmodel.model.packed_batch import ImageMetadata, PackedBatch, group_indices
from vitmodel.model.segments import SegmentAggregator, SegmentsOutput
from vitmodel.model.typicality import record_depth_features
from vitmodel.model.vit import ViT

TRUNK_PREFIX = "trunk."


class Logits(NamedTuple):
    """The logits of a pack at each level."""

    images: Tensor
    """Logits of images `(I, K)`."""
    breasts: Tensor | None = None
    """Logits of breasts `(G,)`, in order of first appearance; None without exam fusion."""
    patients: Tensor | None = None
    """Logits of patients `(E,)`, in order of first appearance; None without exam fusion."""


class AuxiliaryHeads(nn.Linear):
    """One linear head per auxiliary target: features `(I, D)` to the outputs of all targets `(I, A)`, in order.

    It has its own class so that a sharded model can treat it separately from the body.

    Args:
        dim: Width of the features.
        targets: The targets.
    """

    def __init__(self, dim: int, targets: Sequence[AuxiliaryTarget]) -> None:
        super().__init__(dim, count_outputs(targets))


class Network(nn.Module):
    """A ViT, the trunk, with its optional parts.

    `forward` is `apply_heads(features(pack), pack.metadata)`, which computes the logits of all levels in one pass.

    Args:
        config: The trunk and its optional parts.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = ViT(config.vit)
        self.sources = SourceAdapters(config.sources, config.vit) if config.sources else None
        self.exam = ExamFusion(config) if config.exam else None
        self.segments = SegmentAggregator(config.segments, config.vit) if config.segments else None
        self.auxiliary = AuxiliaryHeads(config.vit.dim, config.auxiliary) if config.auxiliary else None

    def make_layout(self, pack: PackedBatch) -> PackedLayout:
        """Return the layout of the pack's tokens; with source adapters, each image passes those of its own sources."""
        lengths = pack.sequence_lengths(self.config.vit.num_prefix_tokens)
        device = pack.images[0].device
        if self.sources is None:
            return PackedLayout(lengths, device)
        return SourceAdaptedLayout(self.sources, pack.metadata, lengths, device)

    def features(self, pack: PackedBatch) -> Tensor:
        """Return the input of the heads for each image, `(I, D)`; independent of the other images of the pack."""
        if self.segments:
            return self.encode_segments(pack).features
        return packed_attention.features(self.trunk, pack, self.make_layout(pack))

    def features_and_depths(self, pack: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """Return the input of the heads `(I, D)`, and from the same pass the features of `typicality` `(I, F, D)`.

        Those of an image that is read in segments are the features of its overview. They are None if another runtime
        encodes the tokens.
        """
        with record_depth_features(self.trunk) as recorded:
            features = self.features(pack)
        return features, recorded.of_first(len(pack)) if recorded.recorded[0] else None

    def encode_segments(self, pack: PackedBatch, lesions: Sequence[Tensor] = ()) -> SegmentsOutput:
        """Encode the pack's images in segments.

        Args:
            pack: Images of any size.
            lesions: Lesion boxes of each image, `(n, 4)`: x0, y0, x1, y1 in pixels. In training, segments that show one
                are read first.
        """
        assert self.segments is not None
        return self.segments.encode_and_aggregate(self.encode, pack, lesions)

    def encode(self, pack: PackedBatch) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Encode each image or part of an image in the pack with the trunk.

        Returns:
            The features of each `(I, D)`, the first logit that the trunk's head computes from them `(I,)`, and the
            encoded patches of each, `(N, D)`.
        """
        tokens = packed_attention.encode(self.trunk, pack, self.make_layout(pack))
        prefix = self.config.vit.num_prefix_tokens
        summaries = torch.cat([self.trunk.pool(image) for image in tokens])
        return summaries, self.trunk.head(summaries)[:, 0], [image[0, prefix:] for image in tokens]

    def apply_heads(self, features: Tensor, metadata: Sequence[ImageMetadata]) -> Logits:
        """Return the logits of images and, with exam fusion, those of their breasts and patients.

        Args:
            features: Features of images `(I, D)`.
            metadata: Metadata of the same images.
        """
        image_logits = self.trunk.head(features)
        if self.exam is None:
            return Logits(image_logits)
        breast_logits = self.exam(features, image_logits[:, 0], metadata)
        exams = group_indices(metadata[breast[0]].exam for breast in group_by_breast(metadata))
        return Logits(image_logits, breast_logits, noisy_or_logits(breast_logits, exams))

    def forward(self, pack: PackedBatch) -> Logits:
        """Return the logits of the pack's images and, with exam fusion, those of their breasts and patients."""
        return self.apply_heads(self.features(pack), pack.metadata)

    def image_and_breast_logits(self, features: Tensor, metadata: Sequence[ImageMetadata]) -> Tensor:
        """Return the first logit of each image and, with exam fusion, that of its breast: `(I, 1)` or `(I, 2)`.

        Args:
            features: Features of images `(I, D)`.
            metadata: Metadata of the same images.
        """
        logits = self.apply_heads(features, metadata)
        image_logits = logits.images[:, :1]
        if logits.breasts is None:
            return image_logits
        breast_logits = torch.empty_like(image_logits[:, 0])
        for indices, logit in zip(group_by_breast(metadata), logits.breasts, strict=True):
            breast_logits[indices] = logit.to(breast_logits.dtype)
        return torch.cat([image_logits, breast_logits[:, None]], dim=1)

    def auxiliary_outputs(self, features: Tensor) -> Tensor:
        """Return the outputs of all auxiliary heads, `(I, A)`, for features of images `(I, D)`; A = 0 without heads."""
        return features[:, :0] if self.auxiliary is None else self.auxiliary(features)

    def with_encoder(self, encode: Callable[[Tensor, PackedLayout], Tensor]) -> Network:
        """Return a network that shares this one's tensors but replaces `ViT.encode`, for example by another runtime.

        Args:
            encode: A function from embedded tokens `(1, T, D)` and their layout to encoded tokens `(1, T, D)`.

        Returns:
            The network, in evaluation mode.
        """
        with torch.device("meta"):
            twin = Network(self.config)
        twin.load_tensors(self.tensors())
        if self.segments is not None and twin.segments is not None:
            twin.segments.config = self.segments.config  # its token budget may differ from the package's
        twin.trunk.encode = encode  # type: ignore[method-assign, assignment]
        return twin.eval()

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name; those of the trunk have the names that they have in the ViT alone."""
        return {name.removeprefix(TRUNK_PREFIX): tensor for name, tensor in self.state_dict().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace all tensors by those that `tensors` returned.

        Raises:
            RuntimeError: The tensors belong to another network.
        """
        part_prefixes = tuple(f"{name}." for name, _ in self.named_children() if name != TRUNK_PREFIX[:-1])
        state = {}
        for name, tensor in tensors.items():
            state[name if name.startswith(part_prefixes) else TRUNK_PREFIX + name] = tensor
        self.load_state_dict(state, assign=True)
