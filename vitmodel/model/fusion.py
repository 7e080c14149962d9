"""Source adapters inside the trunk, and a transformer that fuses summaries of parts.

Within the trunk, the images of each source (machine, view, ...) pass through small residual adapters of low rank
(Rebuffi et al. 2017, arXiv 1705.08045) that only they use. After the trunk, each part of a whole is one summary, and
attention over the summaries gives the summary of the whole: segments of an image, or images of an exam.

Symbols in shapes: `P` parts, `G` wholes, `D` width of a token, `A` heads, `I` images, `T` tokens of all images, `C`
source columns, `V` values of a source, `r` rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitmodel.errors import UsageError
from vitmodel.model.architecture import NetworkConfig, SourcesConfig, ViTConfig
from vitmodel.model.packed_attention import PackedLayout
from vitmodel.model.packed_batch import ImageMetadata, group_indices
from vitmodel.model.vit import Block, init_linear_layers


class SourceAdapter(nn.Module):
    """A residual bottleneck adapter for each value of a source: layer norm, then two matrices of low rank.

    The up-projection starts at 0, so a new adapter adds nothing.

    Args:
        values: Number of values V, including 0 for unknown.
        dim: Width of a token.
        rank: Width of the bottleneck.
        eps: Constant added to the variance in the layer norm.
    """

    def __init__(self, values: int, dim: int, rank: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(values, dim))
        self.beta = nn.Parameter(torch.zeros(values, dim))
        self.down = nn.Parameter(torch.empty(values, dim, rank))
        self.up = nn.Parameter(torch.zeros(values, rank, dim))
        nn.init.trunc_normal_(self.down, std=0.02)

    def forward(self, tokens: Tensor, lengths: list[int], values: list[int]) -> Tensor:
        """Return the offset `(T, D)` to add to the tokens.

        Args:
            tokens: Tokens of all images `(T, D)`, image by image.
            lengths: Number of tokens of each image.
            values: Value of the source of each image.
        """
        normalised = F.layer_norm(tokens, tokens.shape[-1:], eps=self.eps).split(lengths)
        offsets = [
            (x * self.gamma[value] + self.beta[value]) @ self.down[value] @ self.up[value]
            for x, value in zip(normalised, values, strict=True)
        ]
        return torch.cat(offsets)


class SourceAdapters(nn.Module):
    """The adapters of all sources before some of the blocks, and one token per source value, added to the class token.

    New adapters and tokens change nothing.

    Args:
        config: The sources and the size of the adapters.
        vit: The trunk.
    """

    def __init__(self, config: SourcesConfig, vit: ViTConfig) -> None:
        super().__init__()
        self.tokens = nn.ParameterList(torch.zeros(len(column), vit.dim) for column in config.columns)

        def make_adapters() -> nn.ModuleList:
            return nn.ModuleList(SourceAdapter(len(column), vit.dim, config.rank, vit.eps) for column in config.columns)

        adapted_blocks = range((vit.depth - 1) % config.every, vit.depth, config.every)
        self.blocks = nn.ModuleDict({str(index): make_adapters() for index in adapted_blocks})

    def value_indices(self, metadata: Sequence[ImageMetadata]) -> list[list[int]]:
        """Return for each of the C sources the value of each image, 0 where it is unknown: C lists of length I."""
        unknown = (0,) * len(self.tokens)
        per_image = [image.sources or unknown for image in metadata]
        return [list(column) for column in zip(*per_image, strict=True)]

    def class_token_offset(self, values: list[list[int]]) -> Tensor:
        """Return the offset to add to the class token of each image, `(I, D)`.

        Args:
            values: Values from `value_indices`.
        """
        offsets = [token[column] for token, column in zip(self.tokens, values, strict=True)]
        return torch.stack(offsets).sum(dim=0)

    def block_input_offset(
        self, index: int, tokens: Tensor, lengths: list[int], values: list[list[int]]
    ) -> Tensor | None:
        """Return the offset `(T, D)` to add to the tokens that enter block `index`, or None if it has no adapters.

        Args:
            index: Index of the block.
            tokens: Tokens of all images `(T, D)`, image by image.
            lengths: Number of tokens of each image.
            values: Values from `value_indices`.
        """
        if str(index) not in self.blocks:
            return None
        adapters: Any = self.blocks[str(index)]
        offsets = [adapter(tokens, lengths, column) for adapter, column in zip(adapters, values, strict=True)]
        return torch.stack(offsets).sum(dim=0)


class SourceAdaptedLayout(PackedLayout):
    """Many images in one row of tokens, where each image passes through the adapters of its own sources.

    Args:
        sources: The adapters.
        metadata: Metadata of each image.
        lengths: Number of tokens of each image.
        device: Device of the tokens.
    """

    def __init__(
        self, sources: SourceAdapters, metadata: Sequence[ImageMetadata], lengths: list[int], device: torch.device
    ) -> None:
        super().__init__(lengths, device)
        self.sources = sources
        self.values = sources.value_indices(metadata)

    def prepare_block_input(self, index: int, x: Tensor) -> Tensor:
        """Add the source offsets to the tokens `(1, T, D)` that enter block `index`."""
        if index == 0:
            x = x.index_add(1, self.cu_seqlens[:-1], self.sources.class_token_offset(self.values)[None].to(x.dtype))
        offset = self.sources.block_input_offset(index, x[0], self.lengths, self.values)
        return x if offset is None else x + offset[None]


class IntegratorLayout(PackedLayout):
    """Many wholes in one row of tokens, each a query token followed by its parts.

    Every token attends to the parts of its own whole, in proportion to their weights, and never to a query. A part that
    occurs twice at half the weight therefore changes nothing, and the summary does not reveal how many parts a whole
    has.

    Args:
        lengths: Number of parts of each whole.
        weights: Positive weight of each part, `(P,)`.
    """

    query_attention: list[Tensor]
    """Attention of each query at the last call, averaged over heads: for each whole one weight per part."""

    def __init__(self, lengths: list[int], weights: Tensor) -> None:
        super().__init__([1 + length for length in lengths], weights.device)
        self.key_log_weights = [  # one per key, -inf for the query
            F.pad(whole.log(), (1, 0), value=-torch.inf) for whole in weights.split(lengths)
        ]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the weighted attention of each token to the parts of its whole, `(1, A, G + P, D / A)`."""
        outputs = []
        self.query_attention = []
        slices = (x.split(self.lengths, dim=2) for x in (q / q.shape[-1] ** 0.5, k, v))
        for queries, keys, values, log_weights in zip(*slices, self.key_log_weights, strict=True):
            attention = (queries @ keys.transpose(-2, -1) + log_weights).softmax(dim=-1)  # (1, A, 1 + parts, 1 + parts)
            self.query_attention.append(attention[0, :, 0, 1:].mean(dim=0))
            outputs.append(attention.to(values.dtype) @ values)
        return torch.cat(outputs, dim=2)


class Integrator(nn.Module):
    """A transformer that turns the summaries of the parts of a whole into one summary.

    The parts have no order: a summary must already contain what the part is.

    Args:
        vit: The trunk, whose width and heads are used.
        depth: Number of blocks.
    """

    def __init__(self, vit: ViTConfig, depth: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, vit.dim))
        self.blocks = nn.ModuleList(Block(vit, drop_path=0.0) for _ in range(depth))
        self.norm = nn.LayerNorm(vit.dim, vit.eps)
        init_linear_layers(self)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, parts: Tensor, lengths: list[int], weights: Tensor | None = None) -> Tensor:
        """Return the summary of each whole, `(G, D)`.

        Args:
            parts: Summaries of the parts `(P, D)`, whole by whole.
            lengths: Number of parts of each whole.
            weights: Positive weight of each part relative to the others of its whole, `(P,)`; None = equal weights.

        Raises:
            UsageError: A whole has no parts.
        """
        return self._integrate(parts, lengths, weights)[0]

    def attention(self, parts: Tensor, lengths: list[int], weights: Tensor | None = None) -> list[Tensor]:
        """Return the attention of each whole's query to its parts in the last block.

        Args:
            parts: Summaries of the parts `(P, D)`, whole by whole.
            lengths: Number of parts of each whole.
            weights: Positive weight of each part relative to the others of its whole, `(P,)`; None = equal weights.

        Returns:
            For each whole a tensor with one value per part, which sum to 1.

        Raises:
            UsageError: A whole has no parts.
        """
        return self._integrate(parts, lengths, weights)[1]

    def _integrate(self, parts: Tensor, lengths: list[int], weights: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Return the summaries `(G, D)` and the attention of each query in the last block."""
        if min(lengths) < 1:
            raise UsageError(
                f"whole {lengths.index(0) + 1} of {len(lengths)} has no parts; "
                "give each whole at least one image or segment"
            )
        layout = IntegratorLayout(lengths, parts.new_ones(len(parts)) if weights is None else weights)
        sequence = []
        for whole in parts.split(lengths):
            sequence += [self.query.to(parts.dtype), whole]
        tokens = torch.cat(sequence)[None]  # (1, G + P, D)
        for block in self.blocks:
            tokens = block(tokens, layout)
        return self.norm(tokens[0, layout.cu_seqlens[:-1]]), layout.query_attention


class ExamFusion(nn.Module):
    """The logit of each breast from the images of its exam.

    It is the mean of the logits of the breast's images plus a term from the fusion of their features, which is 0 in a
    new network. The images of the other breast take part in the fusion and are marked as such. Each view of a breast
    counts equally, however many images show it.

    Args:
        config: The network, whose `exam` is set.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        assert config.exam is not None
        dim = config.vit.dim
        self.asymmetry = config.exam.asymmetry
        self.views = nn.Parameter(torch.empty(len(config.exam.views), dim))
        self.sides = nn.Parameter(torch.empty(2, dim))  # this breast, the other breast
        columns = config.sources.columns if config.sources else ()
        self.sources = nn.ParameterList(torch.zeros(len(column), dim) for column in columns)
        self.integrator = Integrator(replace(config.vit, layer_scale=None), config.exam.depth)
        self.head = nn.Linear(dim, 1)
        for token in (self.views, self.sides):
            nn.init.trunc_normal_(token, std=0.02)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, logits: Tensor, metadata: Sequence[ImageMetadata]) -> Tensor:
        """Return the logits of breasts `(G,)`, in order of first appearance.

        Args:
            features: Features of images `(I, D)`, in any order.
            logits: Logits of the same images `(I,)`.
            metadata: Metadata of the same images.

        Raises:
            UsageError: A breast has images of two exams.
        """
        weights = view_weights(metadata, features.device)
        parts, image_indices = self.integrator_inputs(features, metadata)
        lengths = [len(indices) for indices in image_indices]
        summaries = self.integrator(parts, lengths, weights[_flatten(image_indices)])  # (G, D)
        means = [
            (logits[breast] * weights[breast]).sum() / weights[breast].sum() for breast in group_by_breast(metadata)
        ]
        mean_logits = torch.stack(means)
        return mean_logits + self.head(summaries).squeeze(-1).to(mean_logits.dtype)

    def integrator_inputs(self, features: Tensor, metadata: Sequence[ImageMetadata]) -> tuple[Tensor, list[list[int]]]:
        """Return the parts of each breast for the integrator.

        Args:
            features: Features of images `(I, D)`, in any order.
            metadata: Metadata of the same images.

        Returns:
            The features with embeddings of view, sources and side, `(P, D)`, breast by breast, and the indices of each
            breast's images: its own, then those of the other breast.

        Raises:
            UsageError: A breast has images of two exams.
        """
        exam_of_image = {index: exam for exam in group_indices(image.exam for image in metadata) for index in exam}
        x = features + self.views[[image.view for image in metadata]].to(features.dtype)
        for column, embeddings in enumerate(self.sources):
            values = [image.sources[column] if image.sources else 0 for image in metadata]
            x = x + embeddings[values].to(x.dtype)
        image_indices = []
        sides = []
        for breast in group_by_breast(metadata):
            others = [index for index in exam_of_image[breast[0]] if index not in breast] if self.asymmetry else []
            image_indices.append(breast + others)
            sides += [0] * len(breast) + [1] * len(others)
        return x[_flatten(image_indices)] + self.sides[sides].to(x.dtype), image_indices


def group_by_breast(metadata: Sequence[ImageMetadata]) -> list[list[int]]:
    """Return the indices of each breast's images, in order of first appearance.

    Raises:
        UsageError: A breast has images of two exams.
    """
    breasts = group_indices(image.breast for image in metadata)
    for indices in breasts:
        if len({metadata[index].exam for index in indices}) > 1:
            numbers = ", ".join(str(index + 1) for index in indices)
            raise UsageError(f"images {numbers} belong to one breast but to several exams; correct their exam ids")
    return breasts


def view_weights(metadata: Sequence[ImageMetadata], device: torch.device) -> Tensor:
    """Return the weight of each image `(I,)`: 1 / the number of images that show its breast in the same view."""
    counts = Counter((image.breast, image.view) for image in metadata)

    def weight(image: ImageMetadata) -> float:
        return 1 / counts[image.breast, image.view] if image.breast >= 0 else 1.0

    return torch.tensor([weight(image) for image in metadata], device=device)


def noisy_or_logits(logits: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Return the logit that at least one member of each group is positive if they are independent (noisy-or).

    With log(1 - p) = -softplus(logit), the sum over a group is -s, and the logit of 1 - exp(-s) is s + log(1 -
    exp(-s)).

    Args:
        logits: Logits `(B,)`.
        groups: Indices of the members of each group.

    Returns:
        One logit per group.
    """
    sums = [F.softplus(logits[list(members)].float()).sum() for members in groups]
    s = torch.stack(sums).clamp(min=torch.finfo(torch.float32).tiny)
    return s + torch.log(-torch.expm1(-s))


def _flatten(indices: Sequence[Sequence[int]]) -> list[int]:
    return [index for group in indices for index in group]
