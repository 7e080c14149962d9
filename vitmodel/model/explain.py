"""Explanations: how much each patch of an image contributes to its score, by four methods.

| method     | question                                             | unit of a patch's value  | cost                 |
|------------|------------------------------------------------------|--------------------------|----------------------|
| rollout    | where does attention come from, whatever the score?  | multiple of the mean     | one forward pass     |
| gradient   | which of this attention is evidence for cancer?      | multiple of the mean     | forward and backward |
| occlusion  | how far does the logit fall if a window is smoothed? | logits per window        | one pass per window  |
| integrated | how far does the patch raise the logit above         | logits; their sum is the | `INTEGRATION_STEPS`  |
|            | that of a smoothed breast?                           | rise of the whole image  | forward and backward |

A network that reads segments is explained part by part (`explain_segments`).

Attention shows where the network reads, not why; the last two methods examine the function itself. No method segments a
lesion. `benchmarks/explain.py` measures all four on phantoms with known lesions.

Symbols in shapes: `B` images, `C` channels, `h` and `w` rows and columns of patches, `T` tokens, `D` width of a token,
`A` heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitmodel.config.choices import EXPLANATIONS, load_choice
from vitmodel.model import packed_attention
from vitmodel.model.network import Network
from vitmodel.model.packed_batch import PackedBatch
from vitmodel.model.vit import DENSE_LAYOUT, SequenceLayout
from vitmodel.utils import import_extra

METHODS = tuple(EXPLANATIONS)
"""Names of the methods that `explain` accepts."""


@dataclass(frozen=True)
class ExplanationMethod:
    """An explanation method, and the unit and colour scale of its maps."""

    function: Callable[[Network, PackedBatch], Tensor]
    """A function from a network and a pack of one image to the relevance of each patch: `(h, w)`, NaN for air."""
    unit: str
    """Unit of a patch's value, where {target} is what the network predicts."""
    scale: tuple[float, float]
    """In this unit: the value up to which a patch has no colour, and the smallest value that may have the strongest
    colour. The second keeps maps without strong evidence pale."""

    @property
    def relative(self) -> bool:
        """Return whether values are multiples of the image's mean, whose scale starts at 1, rather than log-odds."""
        return self.scale[0] == 1

    def unit_for(self, target: str) -> str:
        """Return the unit for a network that predicts `target`, as printed next to the colour bar of a heat map."""
        return self.unit.format(target=target)

    def __call__(self, model: Network, image: PackedBatch) -> Tensor:
        """Return the relevance of each patch, `(h, w)`, NaN for air."""
        return self.function(model, image)


def explanation(
    unit: str, scale: tuple[float, float]
) -> Callable[[Callable[[Network, PackedBatch], Tensor]], ExplanationMethod]:
    """Return a decorator that turns a function into an explanation method.

    To register the method, add it to `vitmodel.config.choices.EXPLANATIONS`.

    Args:
        unit: See `ExplanationMethod.unit`.
        scale: See `ExplanationMethod.scale`.
    """
    return lambda function: ExplanationMethod(function, unit, scale)


def method_named(name: str) -> ExplanationMethod:
    """Return the explanation method registered under `name`.

    Raises:
        UsageError: No method has this name.
    """
    return load_choice(EXPLANATIONS, "explain", name)


WINDOWS_PER_HEIGHT = 16
"""Occlusion windows per image height. In a crop of a whole breast a window is about 1 cm high, the size of a lesion."""
INTEGRATION_STEPS = 24
"""Points on the path from the smoothed breast to the breast, integrated by Gauss-Legendre quadrature."""
TOKENS_PER_PASS = 4096
"""Largest number of tokens per pass of occlusion and integration, unless one image has more. It bounds the memory: a
backward pass keeps the activations of all tokens."""


def explain(model: Network, image: PackedBatch, method: str) -> Tensor:
    """Return the contribution of each patch to the image's own first logit, `(h, w)`, NaN for air.

    The values of `rollout` and `gradient` are never negative; negative values of the other two are evidence against
    cancer. The network's weights and their gradients are not modified.

    Args:
        model: The network.
        image: A pack of one image.
        method: "rollout", "gradient", "occlusion" or "integrated". The module's table lists the units.

    Raises:
        UsageError: No method has this name, or captum, which "occlusion" and "integrated" need, is not installed.
    """
    explanation_method = method_named(method)
    if model.segments is None:
        return explanation_method(model, image)
    return explain_segments(model, image, explanation_method)


def explain_segments(model: Network, image: PackedBatch, method: ExplanationMethod) -> Tensor:
    """Return the map `(h, w)` of an image that the network reads in segments.

    Each part is explained alone, and its values are scaled by the attention of the image's summary to the part,
    relative to the part with the most attention. Where no segment was read, the map shows the overview alone.
    """
    with torch.no_grad():
        reading = model.encode_segments(image)
    (parts,) = reading.parts
    (attention,) = reading.attention
    weights = (attention / attention.max()).cpu()
    maps = [method(model, part).cpu() for part in parts.pack]
    overview, *segments = (weight * part_map for weight, part_map in zip(weights, maps, strict=True))
    upsampled = F.interpolate(overview.nan_to_num()[None, None], parts.grid, mode="bilinear")[0, 0]
    if method is integrated_gradients:  # values that sum over patches are split among the patches that replace one
        upsampled = upsampled * overview.numel() / upsampled.numel()
    kept = image.patch_indices[0]
    values = (parts.stitch_maps(segments).nan_to_num() + upsampled).flatten()[kept.cpu()]
    if method.relative:
        values = values / values.mean().clamp(min=torch.finfo(values.dtype).tiny)
    return image.scatter_to_grid([values.to(kept.device)])[0]


class AttentionRecorder(SequenceLayout):
    """A layout of one image that computes attention explicitly and keeps the weights of the last call.

    Args:
        layout: The layout whose `prepare_block_input` is used.
    """

    weights: Tensor
    """Attention weights of the last call, `(1, A, T, T)`."""

    def __init__(self, layout: SequenceLayout = DENSE_LAYOUT) -> None:
        self.prepare_block_input = layout.prepare_block_input  # type: ignore[method-assign]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention output `(1, A, T, D / A)` and keep the weights."""
        self.weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return self.weights @ v


@explanation(unit="attention, times the mean of the breast", scale=(1, 4))
def rollout(model: Network, image: PackedBatch) -> Tensor:
    """Return the attention rollout of an image (Abnar and Zuidema 2020, arXiv 2005.00928), `(h, w)`.

    Heads are averaged, and each token keeps half of its own relevance. The rollout starts with the tokens that the head
    reads and goes from the last block to the first, so that the attention of only one block is in memory.
    """
    with torch.no_grad():
        inputs, last = _block_inputs(model, image)
        relevance = _readout_weights(model, last)  # (1, T)
        recorder = AttentionRecorder(model.make_layout(image))
        for index, tokens in reversed(list(enumerate(inputs))):
            _run_block(model, index, tokens, recorder)
            flow = torch.einsum("bt,bats->bs", relevance, recorder.weights) / recorder.weights.shape[1]
            relevance = (relevance + flow) / 2
    return _relative_to_mean(model, image, relevance)


@explanation(unit="attention that is evidence for {target}, times the mean of the breast", scale=(1, 4))
def gradient(model: Network, image: PackedBatch) -> Tensor:
    """Return the attention weighted by its gradient, `(h, w)` (Chefer et al. 2021, arXiv 2103.15679, rules 5 and 6).

    The rule is R = R + mean over heads of (dA * A)+ R. Only those rows of R are needed that belong to the tokens which
    the head reads, so the rule runs from the last block to the first, and the attention of only one block is in memory.
    The initial relevance of each token, which comes from being read and not from attention, is left out of the result.

    Weighting those rows by gradient times token, as if mean pooling were attention, was wrong: the norm after the mean
    makes tokens counteract one another, and on phantoms the map pointed away from the lesion.
    """
    with torch.no_grad():
        inputs, last = _block_inputs(model, image)
        initial = _readout_weights(model, last)  # (1, T)
        gained = torch.zeros_like(initial)  # separate from `initial`, next to which it would be lost in rounding
    with torch.enable_grad():
        last.requires_grad_()
        trunk = model.trunk
        logit = trunk.head(trunk.pool(trunk.norm(last)))[:, 0].sum()
        (token_gradient,) = torch.autograd.grad(logit, last)  # (1, T, D)
        recorder = AttentionRecorder(model.make_layout(image))
        for index, tokens in reversed(list(enumerate(inputs))):
            tokens = tokens.requires_grad_()
            output = _run_block(model, index, tokens, recorder)
            token_gradient, weight_gradient = torch.autograd.grad(output, (tokens, recorder.weights), token_gradient)
            evidence = (weight_gradient * recorder.weights.detach()).clamp(min=0)  # (1, A, T, T)
            gained = gained + torch.einsum("bt,bats->bs", initial + gained, evidence) / evidence.shape[1]
    return _relative_to_mean(model, image, gained)


@explanation(unit="log-odds of {target} lost when covered", scale=(0, 1))
def occlusion(model: Network, image: PackedBatch) -> Tensor:
    """Return how far the logit falls if a window over each patch is smoothed, `(h, w)`, computed by captum.

    Windows are half a window apart (Zeiler and Fergus 2014, arXiv 1311.2901); a patch has the mean of those that cover
    it.
    """
    captum = _captum()
    (pixels,) = image.images
    side = image.patch * max(1, round(pixels.shape[1] / WINDOWS_PER_HEIGHT / image.patch))
    with torch.no_grad():
        attributions = captum.Occlusion(logit_function(model, image)).attribute(
            pixels[None],
            sliding_window_shapes=(pixels.shape[0], side, min(side, pixels.shape[2])),
            strides=(pixels.shape[0], side // 2, side // 2),
            baselines=smooth_tissue(pixels, image.patch)[None],
            perturbations_per_eval=_images_per_pass(model, image),
        )
    return _per_patch(image, attributions)


@explanation(unit="log-odds of {target} added by each patch", scale=(0, 1))
def integrated_gradients(model: Network, image: PackedBatch) -> Tensor:
    """Return the integrated gradients from the smoothed breast to the breast, summed per patch, `(h, w)`.

    They are computed by captum (Sundararajan et al. 2017, arXiv 1703.01365).
    """
    captum = _captum()
    (pixels,) = image.images
    with torch.enable_grad():
        attributions = captum.IntegratedGradients(logit_function(model, image)).attribute(
            pixels[None],
            baselines=smooth_tissue(pixels, image.patch)[None],
            n_steps=INTEGRATION_STEPS,
            internal_batch_size=_images_per_pass(model, image),
        )
    return _per_patch(image, attributions.detach()) * pixels.shape[0] * image.patch**2


def smooth_tissue(pixels: Tensor, patch: int) -> Tensor:
    """Return the breast without lesion-sized structures: each pixel is the mean of nearby tissue, and air stays 0.

    As a baseline it replaces a window by tissue and not by a black hole, which no mammogram contains, and it has the
    same patches as the image.

    Args:
        pixels: Pixels `(C, H, W)`.
        patch: Side of a patch in pixels.
    """
    tissue = (pixels > 0).to(pixels.dtype)
    side = 2 * max(patch, round(pixels.shape[1] / WINDOWS_PER_HEIGHT)) + 1

    def blur(x: Tensor) -> Tensor:
        for _ in range(2):  # two box filters approximate a Gaussian
            x = F.avg_pool2d(x[None], side, stride=1, padding=side // 2)[0]
        return x

    return tissue * blur(pixels) / blur(tissue).clamp(min=1e-6)


def _block_inputs(model: Network, image: PackedBatch) -> tuple[list[Tensor], Tensor]:
    """Return the input of each block and the output of the last one, each `(1, T, D)`."""
    tokens = packed_attention.embed(model.trunk, image)
    inputs = []
    layout = model.make_layout(image)
    for index in range(len(model.trunk.blocks)):
        inputs.append(tokens)
        tokens = _run_block(model, index, tokens, layout)
    return inputs, tokens


def _run_block(model: Network, index: int, tokens: Tensor, layout: SequenceLayout) -> Tensor:
    """Return the output of block `index`, `(1, T, D)`, for its input `(1, T, D)`."""
    return model.trunk.blocks[index](layout.prepare_block_input(index, tokens), layout)


def _readout_weights(model: Network, tokens: Tensor) -> Tensor:
    """Return the share of each token in the input of the head, `(1, T)`: the class token, or all patches equally."""
    share = torch.zeros_like(tokens[..., 0])
    readers = slice(0, 1) if model.config.vit.pool == "cls" else slice(model.config.vit.num_prefix_tokens, None)
    share[:, readers] = 1 / share[:, readers].shape[1]
    return share


def logit_function(model: Network, image: PackedBatch) -> Callable[[Tensor], Tensor]:
    """Return the network as a function from pixels `(B, C, H, W)` to first logits `(B,)`.

    The function always reads the kept patches of `image`, whatever the pixels are.
    """

    def logits(pixels: Tensor) -> Tensor:
        pack = dataclasses.replace(
            image,
            names=image.names * len(pixels),
            images=tuple(pixels),
            patch_indices=image.patch_indices * len(pixels),
            metadata=image.metadata * len(pixels),
        )
        return model.trunk.head(packed_attention.features(model.trunk, pack, model.make_layout(pack)))[:, 0]

    return logits


def _relative_to_mean(model: Network, image: PackedBatch, relevance: Tensor) -> Tensor:
    """Return the relevance of tokens `(1, T)` as multiples of the patches' mean, `(h, w)`; all 0 if there is none."""
    patches = relevance[0, model.config.vit.num_prefix_tokens :]
    return image.scatter_to_grid([patches / patches.mean().clamp(min=torch.finfo(patches.dtype).tiny)])[0]


def _images_per_pass(model: Network, image: PackedBatch) -> int:
    """Return how many variants of an image fit in `TOKENS_PER_PASS`, at least 1."""
    (length,) = image.sequence_lengths(model.config.vit.num_prefix_tokens)
    return max(1, TOKENS_PER_PASS // length)


def _per_patch(image: PackedBatch, attributions: Tensor) -> Tensor:
    """Return the mean of pixel attributions `(1, C, H, W)` over each kept patch, `(h, w)`, NaN for air."""
    means = F.avg_pool2d(attributions.mean(dim=1), image.patch)[0]
    return image.scatter_to_grid([means.flatten()[image.patch_indices[0]]])[0]


def _captum() -> Any:
    """Return captum's attribution methods. Raise UsageError if captum is not installed."""
    return import_extra("captum", "explain", "explain").attr
