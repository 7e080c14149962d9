"""Parts learned apart, then integrated: adapters for each source of images, and a transformer over summaries of parts.

Both ends of one thought. On the way through the trunk, images of each source (machine, view ...) pass through small parts of their own
(residual adapters, Rebuffi et al. 2017, arXiv 1705.08045, of low rank). Then each part of a whole is one summary, and attention reads the
whole off its parts: segments of an image, images of an exam. Knows tensors and numbers of groups, no table and no pixels.

Shapes:  P parts   G wholes   D width   I images   T tokens of all images   V values of a source   r rank
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
    """For each value of a source: a normalisation's affine and two matrices with a narrow waist, added to the stream. Starts as nothing."""

    def __init__(self, values: int, dim: int, rank: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(values, dim))
        self.beta = nn.Parameter(torch.zeros(values, dim))
        self.down = nn.Parameter(torch.empty(values, dim, rank))
        self.up = nn.Parameter(torch.zeros(values, rank, dim))
        nn.init.trunc_normal_(self.down, std=0.02)

    def forward(self, tokens: Tensor, lengths: list[int], values: list[int]) -> Tensor:
        """What is added to the tokens of images of `values`, one after another with `lengths` tokens: T D -> T D."""
        normal = F.layer_norm(tokens, tokens.shape[-1:], eps=self.eps).split(lengths)
        each = [
            (x * self.gamma[v] + self.beta[v]) @ self.down[v] @ self.up[v] for x, v in zip(normal, values, strict=True)
        ]
        return torch.cat(each)


class SourceAdapters(nn.Module):
    """Of each source a token, added to the class token, and adapters before some of the blocks. Fresh, they change nothing."""

    def __init__(self, config: SourcesConfig, vit: ViTConfig) -> None:
        super().__init__()
        self.tokens = nn.ParameterList(torch.zeros(len(column), vit.dim) for column in config.columns)
        chosen = range((vit.depth - 1) % config.every, vit.depth, config.every)
        self.blocks = nn.ModuleDict(
            {
                str(block): nn.ModuleList(
                    SourceAdapter(len(column), vit.dim, config.rank, vit.eps) for column in config.columns
                )
                for block in chosen
            }
        )

    def value_indices(self, metadata: Sequence[ImageMetadata]) -> list[list[int]]:
        """The images' values of each source: C lists of I. What is not known of an image is 0."""
        return [
            list(each) for each in zip(*(known.sources or (0,) * len(self.tokens) for known in metadata), strict=True)
        ]

    def class_token_offset(self, values: list[list[int]]) -> Tensor:
        """What is added to the class token of each image: I D."""
        return torch.stack([token[each] for token, each in zip(self.tokens, values, strict=True)]).sum(dim=0)

    def block_input_offset(
        self, number: int, tokens: Tensor, lengths: list[int], values: list[list[int]]
    ) -> Tensor | None:
        """What is added to the tokens (T D) before block `number`, summed over the sources; None = nothing."""
        if str(number) not in self.blocks:
            return None
        adapters: Any = self.blocks[str(number)]
        return torch.stack(
            [adapter(tokens, lengths, each) for adapter, each in zip(adapters, values, strict=True)]
        ).sum(dim=0)


class SourceAdaptedLayout(PackedLayout):
    """Images in one row of tokens, which pass through the parts of their own sources."""

    def __init__(
        self, sources: SourceAdapters, metadata: Sequence[ImageMetadata], lengths: list[int], device: torch.device
    ) -> None:
        super().__init__(lengths, device)
        self.sources = sources
        self.values = sources.value_indices(metadata)

    def prepare_block_input(self, number: int, x: Tensor) -> Tensor:
        if number == 0:
            x = x.index_add(1, self.cu_seqlens[:-1], self.sources.class_token_offset(self.values)[None].to(x.dtype))
        added = self.sources.block_input_offset(number, x[0], self.lengths, self.values)
        return x if added is None else x + added[None]


class IntegratorLayout(PackedLayout):
    """Wholes in one row of tokens, each a query before its parts. A token attends to the parts of its whole, each weighing as much as it
    is told, and to no query: a part that stands there twice at half the weight changes nothing, so that a whole is not known by how many
    parts it has."""

    query_attention: list[Tensor]
    """What each query attended to at the last call: P_g each, for the g-th whole with P_g parts, the mean over heads."""

    def __init__(self, lengths: list[int], weights: Tensor) -> None:
        super().__init__([1 + length for length in lengths], weights.device)
        self.key_log_weights = [
            F.pad(each.log(), (1, 0), value=-torch.inf) for each in weights.split(lengths)
        ]  # of keys, 1 + P_g each

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        read, self.query_attention = [], []
        each = zip(
            *(x.split(self.lengths, dim=2) for x in (q / q.shape[-1] ** 0.5, k, v)), self.key_log_weights, strict=True
        )
        for queries, keys, values, share in each:
            weights = (queries @ keys.transpose(-2, -1) + share).softmax(dim=-1)  # 1 A 1+P_g 1+P_g
            self.query_attention.append(weights[0, :, 0, 1:].mean(dim=0))
            read.append(weights.to(values.dtype) @ values)
        return torch.cat(read, dim=2)


class Integrator(nn.Module):
    """A transformer that reads wholes off the summaries of their parts, in no order: what a part is must stand in its summary."""

    def __init__(self, vit: ViTConfig, depth: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, vit.dim))
        self.blocks = nn.ModuleList(Block(vit, drop_path=0.0) for _ in range(depth))
        self.norm = nn.LayerNorm(vit.dim, vit.eps)
        init_linear_layers(self)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, parts: Tensor, lengths: list[int], weights: Tensor | None = None) -> Tensor:
        """Summaries of parts, those of a whole one after another, `lengths` each -> of each whole: P D -> G D. `weights` (P, positive)
        say how much a part counts beside others of its whole; none = all alike. Raises UsageError for a whole without parts."""
        return self._read(parts, lengths, weights)[0]

    def attention(self, parts: Tensor, lengths: list[int], weights: Tensor | None = None) -> list[Tensor]:
        """How much each whole's query attends to each of its parts in the last block: G tensors of P_g, which sum to 1."""
        return self._read(parts, lengths, weights)[1]

    def _read(self, parts: Tensor, lengths: list[int], weights: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        if min(lengths) < 1:
            raise UsageError(f"whole {lengths.index(0) + 1} of {len(lengths)} has no part that can be read")
        layout = IntegratorLayout(lengths, parts.new_ones(len(parts)) if weights is None else weights)
        tokens = torch.cat([part for whole in parts.split(lengths) for part in (self.query.to(parts.dtype), whole)])[
            None
        ]  # 1 G+P D
        for block in self.blocks:
            tokens = block(tokens, layout)
        return self.norm(tokens[0, layout.cu_seqlens[:-1]]), layout.query_attention


class ExamFusion(nn.Module):
    """From the images of an exam to a logit per breast: the mean of its images' logits, and what their integration adds to that, at first
    nothing.

    A breast's images are integrated with those of the other breast, which are marked as such, and each view of a breast counts as much as
    any other, however many images show it.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        assert config.exam is not None
        dim = config.vit.dim
        self.asymmetry = config.exam.asymmetry
        self.views = nn.Parameter(torch.empty(len(config.exam.views), dim))
        self.sides = nn.Parameter(torch.empty(2, dim))  # this breast, the other one
        columns = config.sources.columns if config.sources else ()
        self.sources = nn.ParameterList(torch.zeros(len(column), dim) for column in columns)
        self.integrator = Integrator(replace(config.vit, layer_scale=None), config.exam.depth)
        self.head = nn.Linear(dim, 1)
        for token in (self.views, self.sides):
            nn.init.trunc_normal_(token, std=0.02)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, logits: Tensor, metadata: Sequence[ImageMetadata]) -> Tensor:
        """Features and logits of images, in any order -> logits of breasts, in order of first appearance: I D, I -> G."""
        weights = view_weights(metadata, features.device)
        parts, places = self.integrator_inputs(features, metadata)
        whole = self.integrator(
            parts, [len(each) for each in places], weights[[place for each in places for place in each]]
        )  # G D
        means = torch.stack(
            [(logits[each] * weights[each]).sum() / weights[each].sum() for each in group_by_breast(metadata)]
        )
        return means + self.head(whole).squeeze(-1).to(means.dtype)

    def integrator_inputs(self, features: Tensor, metadata: Sequence[ImageMetadata]) -> tuple[Tensor, list[list[int]]]:
        """The integrator's input, features with what each image is to the breast; and which images these are, for each breast: P D, G."""
        of_exam = {place: exam for exam in group_indices(known.exam for known in metadata) for place in exam}
        x = features + self.views[[known.view for known in metadata]].to(features.dtype)
        for number, source in enumerate(self.sources):
            x = x + source[[known.sources[number] if known.sources else 0 for known in metadata]].to(x.dtype)
        places, far = [], []
        for breast in group_by_breast(metadata):
            others = [place for place in of_exam[breast[0]] if place not in breast] if self.asymmetry else []
            places.append(breast + others)
            far += [0] * len(breast) + [1] * len(others)
        return x[[place for each in places for place in each]] + self.sides[far].to(x.dtype), places


def group_by_breast(metadata: Sequence[ImageMetadata]) -> list[list[int]]:
    """The images of each breast, in order of first appearance. Raises UsageError where a breast has images of two exams."""
    found = group_indices(known.breast for known in metadata)
    for breast in found:
        if len({metadata[place].exam for place in breast}) > 1:
            raise UsageError(
                f"images {', '.join(str(place + 1) for place in breast)} are of one breast, but not of one exam"
            )
    return found


def view_weights(metadata: Sequence[ImageMetadata], device: torch.device) -> Tensor:
    """What each image counts beside others of its breast: I, 1 / the number of images that show the breast in the same view."""
    alike = Counter((known.breast, known.view) for known in metadata)
    return torch.tensor(
        [1 / alike[known.breast, known.view] if known.breast >= 0 else 1.0 for known in metadata], device=device
    )


def noisy_or_logits(logits: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """The logit that at least one member of each group is positive, if they are independent (noisy or): B -> one per group.

    log(1 - p) = -softplus(logit) adds up to -s; the logit of 1 - exp(-s) is s + log(1 - exp(-s)).
    """
    s = torch.stack([F.softplus(logits[list(each)].float()).sum() for each in groups]).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    return s + torch.log(-torch.expm1(-s))
