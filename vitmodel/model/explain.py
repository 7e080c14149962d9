"""Which patches of an image speak for its score: four ways to ask one model. Knows no file, no source pixel and no colour.

| method     | answers                                                     | unit of a patch's value           | cost                  |
|------------|-------------------------------------------------------------|-----------------------------------|-----------------------|
| rollout    | where attention flows from, whatever the answer             | times the image's mean            | a forward pass        |
| gradient   | where attention flows from and speaks for cancer            | times the image's mean            | forward and backward  |
| occlusion  | how far the logit falls where a window is smoothed away     | logits per window                 | a pass per window     |
| integrated | how far each patch lifts the logit above a smoothed breast  | logits; they sum to the whole     | `STEPS` of both       |

A network that reads segments is explained part by part (`explain_segments`).

Attention says where the network looks, not why; the last two ask the function itself. None of them is a segmentation of a lesion.
`benchmarks/explain.py` measures all four on phantoms whose lesions are known.
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
    """An explanation method and how its maps are read."""

    function: Callable[[Network, PackedBatch], Tensor]
    """From a model and a pack of one image to the relevance of each patch: (h, w), NaN for air."""
    unit: str
    """Unit of a patch's value, printed beside the heat map's colour bar."""
    scale: tuple[float, float]
    """In these units: the value up to which a patch stays uncoloured, and the smallest that may take the strongest colour, so that a map
    without strong evidence stays pale."""

    @property
    def relative(self) -> bool:
        """Whether values are multiples of the image's mean (the scale then starts at 1) rather than log-odds."""
        return self.scale[0] == 1

    def __call__(self, model: Network, image: PackedBatch) -> Tensor:
        return self.function(model, image)


def explanation(
    unit: str, scale: tuple[float, float]
) -> Callable[[Callable[[Network, PackedBatch], Tensor]], ExplanationMethod]:
    """Decorate a function as an explanation method; `vitmodel.config.choices.EXPLANATIONS` names it."""
    return lambda function: ExplanationMethod(function, unit, scale)


def method_named(name: str) -> ExplanationMethod:
    """Return the explanation method registered under `name`. Raises UsageError if there is none."""
    return load_choice(EXPLANATIONS, "explain", name)


WINDOWS_PER_HEIGHT = 16  # as many windows as this fit below one another: on a crop of a whole breast about 1 cm each, the size of a lesion
INTEGRATION_STEPS = 24  # points on the way from the smoothed breast to the breast, integrated by Gauss-Legendre
IMAGES_PER_PASS = 4  # images per pass while occluding and integrating


def explain(model: Network, image: PackedBatch, method: str) -> Tensor:
    """How much each patch of the one image in `image` speaks for the first logit of the image itself: h w, NaN = air, units as above.

    `rollout` and `gradient` are never negative; below 0 the other two speak against. The model's weights and their gradients stay
    untouched. Raises UsageError where captum, which two methods need, is not installed, or no method has that name.
    """
    chosen = method_named(method)
    return chosen(model, image) if model.segments is None else explain_segments(model, image, chosen)


def explain_segments(model: Network, image: PackedBatch, method: ExplanationMethod) -> Tensor:
    """The parts that the model reads, each explained by itself, weighted by how much the image's summary attends to them: h w.

    The part that it attends to most keeps its values, others count in proportion; what was not read has the view of the whole alone.
    """
    with torch.no_grad():
        reading = model.encode_segments(image)
    (parts,), (attention,) = reading.parts, reading.attention
    maps = [method(model, part).cpu() for part in parts.pack]
    whole, *segments = (weight * each for weight, each in zip((attention / attention.max()).cpu(), maps, strict=True))
    view = F.interpolate(whole.nan_to_num()[None, None], parts.grid, mode="bilinear")[0, 0]
    if method is integrated_gradients:  # what sums up over patches is shared among the patches in the place of one
        view = view * whole.numel() / view.numel()
    found = (parts.stitch_maps(segments).nan_to_num() + view).flatten()[image.patch_indices[0].cpu()]
    if method.relative:
        found = found / found.mean().clamp(min=torch.finfo(found.dtype).tiny)
    return image.scatter_to_grid([found.to(image.patch_indices[0].device)])[0]


class AttentionRecorder(SequenceLayout):
    """Attention within one image, written out and kept: A T T after each call. What else its `layout` does is done."""

    weights: Tensor

    def __init__(self, layout: SequenceLayout = DENSE_LAYOUT) -> None:
        self.prepare_block_input = layout.prepare_block_input  # type: ignore[method-assign]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)  # 1 A T T
        return self.weights @ v


@explanation(unit="attention, times the mean of the breast", scale=(1, 4))
def rollout(model: Network, image: PackedBatch) -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928): heads averaged, half of each token stays where it is.

    The attention that the head reads is followed from the last block to the first, so that one block's is held at a time.
    """
    with torch.no_grad():
        inputs, last = _block_inputs(model, image)
        relevance = _readout_weights(model, last)  # 1 T
        recorder = AttentionRecorder(model.make_layout(image))
        for number, tokens in reversed(list(enumerate(inputs))):
            _run_block(model, number, tokens, recorder)
            relevance = (
                relevance + torch.einsum("bt,bats->bs", relevance, recorder.weights) / recorder.weights.shape[1]
            ) / 2
    return _relative_to_mean(model, image, relevance)


@explanation(unit="attention that speaks for cancer, times the mean of the breast", scale=(1, 4))
def gradient(model: Network, image: PackedBatch) -> Tensor:
    """Attention weighted by its gradient (Chefer et al. 2021, arXiv 2103.15679, rules 5 and 6): R = R + mean over heads of (dA * A)+ R.

    Of R only the rows of the tokens that the head reads are needed, so the rule runs from the last block to the first, and one block's
    attention is held at a time. What each token has from being read itself is no attention and left out. (To weight those rows by
    gradient times token, as if a mean were attention, was wrong: the norm after it makes tokens speak against each other, and on
    phantoms the map pointed away from the lesion.)
    """
    with torch.no_grad():
        inputs, last = _block_inputs(model, image)
        read = _readout_weights(model, last)  # 1 T
        gained = torch.zeros_like(read)  # apart from `read`, beside which it would be lost in rounding
    with torch.enable_grad():
        last.requires_grad_()
        trunk = model.trunk
        logit = trunk.head(trunk.pool(trunk.norm(last)))[:, 0].sum()
        (slope,) = torch.autograd.grad(logit, last)  # 1 T D
        recorder = AttentionRecorder(model.make_layout(image))
        for number, tokens in reversed(list(enumerate(inputs))):
            tokens = tokens.requires_grad_()
            out = _run_block(model, number, tokens, recorder)
            slope, by_weight = torch.autograd.grad(out, (tokens, recorder.weights), slope)
            spoken = (by_weight * recorder.weights.detach()).clamp(min=0)  # 1 A T T
            gained = gained + torch.einsum("bt,bats->bs", read + gained, spoken) / spoken.shape[1]
    return _relative_to_mean(model, image, gained)


@explanation(unit="log-odds of cancer lost when covered", scale=(0, 1))
def occlusion(model: Network, image: PackedBatch) -> Tensor:
    """Windows smoothed away one after another, half a window apart (Zeiler and Fergus 2014, arXiv 1311.2901), by captum."""
    captum = _captum()
    (pixels,) = image.images
    side = image.patch * max(1, round(pixels.shape[1] / WINDOWS_PER_HEIGHT / image.patch))
    with torch.no_grad():
        found = captum.Occlusion(logit_function(model, image)).attribute(
            pixels[None],
            sliding_window_shapes=(pixels.shape[0], side, min(side, pixels.shape[2])),
            strides=(pixels.shape[0], side // 2, side // 2),
            baselines=smooth_tissue(pixels, image.patch)[None],
            perturbations_per_eval=IMAGES_PER_PASS,
        )
    return _per_patch(image, found)


@explanation(unit="log-odds of cancer added by each patch", scale=(0, 1))
def integrated_gradients(model: Network, image: PackedBatch) -> Tensor:
    """Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) from the smoothed breast to the breast, by captum, per patch."""
    captum = _captum()
    (pixels,) = image.images
    with torch.enable_grad():
        found = captum.IntegratedGradients(logit_function(model, image)).attribute(
            pixels[None],
            baselines=smooth_tissue(pixels, image.patch)[None],
            n_steps=INTEGRATION_STEPS,
            internal_batch_size=IMAGES_PER_PASS,
        )
    return _per_patch(image, found.detach()) * pixels.shape[0] * image.patch**2


def smooth_tissue(pixels: Tensor, patch: int) -> Tensor:
    """The breast without anything lesion-sized: each pixel (C H W) the mean of the tissue about it, air still air.

    What is compared with it is tissue, not a black hole that no mammogram has, and it has the same patches.
    """
    tissue = (pixels > 0).to(pixels.dtype)
    side = 2 * max(patch, round(pixels.shape[1] / WINDOWS_PER_HEIGHT)) + 1

    def blur(x: Tensor) -> Tensor:
        for _ in range(2):  # two boxes are nearly a Gaussian
            x = F.avg_pool2d(x[None], side, stride=1, padding=side // 2)[0]
        return x

    return tissue * blur(pixels) / blur(tissue).clamp(min=1e-6)


def _block_inputs(model: Network, image: PackedBatch) -> tuple[list[Tensor], Tensor]:
    """What each block takes and what the last one gives: 1 T D each."""
    tokens, inputs, layout = packed_attention.embed(model.trunk, image), [], model.make_layout(image)
    for number in range(len(model.trunk.blocks)):
        inputs.append(tokens)
        tokens = _run_block(model, number, tokens, layout)
    return inputs, tokens


def _run_block(model: Network, number: int, tokens: Tensor, layout: SequenceLayout) -> Tensor:
    """From what block `number` takes to what the next one takes: 1 T D -> 1 T D."""
    return model.trunk.blocks[number](layout.prepare_block_input(number, tokens), layout)


def _readout_weights(model: Network, tokens: Tensor) -> Tensor:
    """The share of each token (1 T D) in what the head reads: the class token, or all patches alike; 1 T."""
    share = torch.zeros_like(tokens[..., 0])
    readers = slice(0, 1) if model.config.vit.pool == "cls" else slice(model.config.vit.num_prefix_tokens, None)
    share[:, readers] = 1 / share[:, readers].shape[1]
    return share


def logit_function(model: Network, image: PackedBatch) -> Callable[[Tensor], Tensor]:
    """The model as a function of pixels (B C H W -> B) that looks at the patches of `image` whatever the pixels are."""

    def of(pixels: Tensor) -> Tensor:
        alike = dataclasses.replace(
            image,
            names=image.names * len(pixels),
            images=tuple(pixels),
            patch_indices=image.patch_indices * len(pixels),
            metadata=image.metadata * len(pixels),
        )
        return model.trunk.head(packed_attention.features(model.trunk, alike, model.make_layout(alike)))[:, 0]

    return of


def _relative_to_mean(model: Network, image: PackedBatch, relevance: Tensor) -> Tensor:
    """Relevance of all tokens (1 T) as multiples of the kept patches' mean: h w; all 0 where nothing speaks."""
    patches = relevance[0, model.config.vit.num_prefix_tokens :]
    return image.scatter_to_grid([patches / patches.mean().clamp(min=torch.finfo(patches.dtype).tiny)])[0]


def _per_patch(image: PackedBatch, found: Tensor) -> Tensor:
    """Pixel values (1 C H W) as the mean of each kept patch: h w, NaN = air."""
    means = F.avg_pool2d(found.mean(dim=1), image.patch)[0]
    return image.scatter_to_grid([means.flatten()[image.patch_indices[0]]])[0]


def _captum() -> Any:
    return import_extra("captum", "explain", "explain").attr
