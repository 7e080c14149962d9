"""The whole network: a Vision Transformer and what may stand around it, segments, adapters for sources and the fusion of an exam.

Without extras it is the ViT and nothing else: the same numbers, and the same tensors under the same names in a package. Knows packs, no
table, loss or file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitmodel.model import packed_attention
from vitmodel.model.architecture import NetworkConfig
from vitmodel.model.fusion import ExamFusion, SourceAdaptedLayout, SourceAdapters, group_by_breast, noisy_or_logits
from vitmodel.model.packed_attention import PackedLayout
from vitmodel.model.packed_batch import ImageMetadata, PackedBatch, group_indices
from vitmodel.model.segments import SegmentAggregator, SegmentsOutput
from vitmodel.model.vit import ViT

TRUNK_PREFIX = "trunk."


class Logits(NamedTuple):
    """What a network says of a pack, at each level."""

    images: Tensor  # I K
    breasts: Tensor | None = None  # G, in order of first appearance; None without the fusion of exams
    patients: Tensor | None = None  # E, likewise


class Network(nn.Module):
    """`forward` = `read(features(pack), pack.about)`: all levels in one pass."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = ViT(config.vit)
        self.sources = SourceAdapters(config.sources, config.vit) if config.sources else None
        self.exam = ExamFusion(config) if config.exam else None
        self.segments = SegmentAggregator(config.segments, config.vit) if config.segments else None

    def make_layout(self, pack: PackedBatch) -> PackedLayout:
        """How the pack's images go through the trunk: each through the parts of its own sources."""
        lengths, device = pack.sequence_lengths(self.config.vit.num_prefix_tokens), pack.images[0].device
        return (
            PackedLayout(lengths, device)
            if self.sources is None
            else SourceAdaptedLayout(self.sources, pack.metadata, lengths, device)
        )

    def features(self, pack: PackedBatch) -> Tensor:
        """What the heads read of each image, as if it were alone: I D."""
        return (
            self.encode_segments(pack).features
            if self.segments
            else packed_attention.features(self.trunk, pack, self.make_layout(pack))
        )

    def encode_segments(self, pack: PackedBatch, lesions: Sequence[Tensor] = ()) -> SegmentsOutput:
        """What is seen of images in segments; while it trains, `lesions` (K 4 for each image, pixels) are among what is looked at."""
        assert self.segments is not None
        return self.segments.encode_and_aggregate(self.encode, pack, lesions)

    def encode(self, pack: PackedBatch) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What the trunk makes of each part, the first logit that its head reads off that, and each part's encoded patches: I D, I, N D."""
        tokens, prefix = (
            packed_attention.encode(self.trunk, pack, self.make_layout(pack)),
            self.config.vit.num_prefix_tokens,
        )
        summaries = torch.cat([self.trunk.pool(part) for part in tokens])
        return summaries, self.trunk.head(summaries)[:, 0], [part[0, prefix:] for part in tokens]

    def apply_heads(self, features: Tensor, metadata: Sequence[ImageMetadata]) -> Logits:
        """The logits of images from their features (I D) and, with the fusion of exams, of their breasts and patients."""
        images = self.trunk.head(features)
        if self.exam is None:
            return Logits(images)
        of_breasts = self.exam(features, images[:, 0], metadata)
        exams = group_indices(metadata[breast[0]].exam for breast in group_by_breast(metadata))
        return Logits(images, of_breasts, noisy_or_logits(of_breasts, exams))

    def forward(self, pack: PackedBatch) -> Logits:
        return self.apply_heads(self.features(pack), pack.metadata)

    def image_and_breast_logits(self, features: Tensor, metadata: Sequence[ImageMetadata]) -> Tensor:
        """Of each image its own first logit and, with the fusion of exams, its breast's: I L, L = 1 or 2."""
        said = self.apply_heads(features, metadata)
        own = said.images[:, :1]
        if said.breasts is None:
            return own
        breast = torch.empty_like(own[:, 0])
        for places, logit in zip(group_by_breast(metadata), said.breasts, strict=True):
            breast[places] = logit.to(breast.dtype)
        return torch.cat([own, breast[:, None]], dim=1)

    def with_encoder(self, encode: Callable[[Tensor, PackedLayout], Tensor]) -> Network:
        """This network with its tensors, but the trunk's blocks are run by `encode`, such as another runtime, in place of `ViT.encode`."""
        with torch.device("meta"):
            twin = Network(self.config)
        twin.load_tensors(self.tensors())
        if self.segments is not None and twin.segments is not None:
            twin.segments.config = self.segments.config  # whose budget may be another one
        twin.trunk.encode = encode  # type: ignore[method-assign, assignment]
        return twin.eval()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors; the trunk's under the ViT's own names."""
        return {name.removeprefix(TRUNK_PREFIX): tensor for name, tensor in self.state_dict().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Become what `tensors` returned. Raises RuntimeError where they are of another network."""
        extras = tuple(f"{name}." for name, _ in self.named_children() if name != TRUNK_PREFIX[:-1])
        renamed = {name if name.startswith(extras) else TRUNK_PREFIX + name: tensor for name, tensor in tensors.items()}
        self.load_state_dict(renamed, assign=True)
