"""The Vision Transformer, whole: images to tokens to features to logits. Knows no data, loss, file format or mammogram.

Dosovitskiy et al. 2021 (arXiv 2010.11929) with pre-norm blocks and timm's parameter names. Two parameters differ in shape from timm's, so
that weights fit images and packs of any shape; `weights.py` converts both without changing the function:

- `pos_embed` is 1 h w D, the grid that it is. The class token has no position of its own: their sum is one vector, held in `cls_token`.
- `patch_embed.proj` has one input channel.

Shapes:  B images   C channels   H W height and width in pixels   P patch side   h w grid of patches, h = H / P
         N = h w patches   R prefix tokens: one class token and the registers   T = R + N tokens   D width   A heads   K classes
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitmodel.errors import UsageError
from vitmodel.model.architecture import ViTConfig, patch_grid
from vitmodel.model.device import linear


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images into patches, row by row, each flattened as a convolution's kernel is: B C H W -> B N C·P·P."""
    h, w = patch_grid((images.shape[-2], images.shape[-1]), patch)
    return images.unflatten(3, (w, patch)).unflatten(2, (h, patch)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions for another grid by antialiased bicubic interpolation: 1 h w D -> 1 h' w' D."""
    if positions.shape[1:3] == grid:
        return positions
    resized = F.interpolate(positions.float().permute(0, 3, 1, 2), size=grid, mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).to(positions.dtype)


class SequenceLayout:
    """How images share a tensor of tokens: here one image per row, B T D. A pack of many images in one row overrides the first two."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention of each token to the tokens of its own image: 3 x (B A T D/A) -> B A T D/A."""
        return F.scaled_dot_product_attention(q, k, v)

    def sample_per_image(self, x: Tensor) -> Tensor:
        """One uniform random number in [0, 1) per image, in a shape that broadcasts over its tokens: B T D -> B 1 1."""
        return torch.rand(x.shape[0], 1, 1, device=x.device)

    def prepare_block_input(self, number: int, x: Tensor) -> Tensor:
        """What block `number` is given of the tokens before it: B T D -> B T D. Here it is all of them as they are."""
        return x


DENSE_LAYOUT = SequenceLayout()


def fold_input_standardisation(conv: nn.Conv2d) -> nn.Conv2d:
    """A freshly drawn layer that takes crops as if they were standardised: they have mean and deviation of about a quarter.

    On the meta device, where a package's tensors will come, nothing is computed: torch would import its compiler for it.
    """
    if conv.weight.is_meta:
        return conv
    with torch.no_grad():
        conv.weight.mul_(4)
        if conv.bias is not None:
            conv.bias.sub_(conv.weight.sum((1, 2, 3)) / 4)
    return conv


class LinearStem(nn.Module):
    """Patches to tokens by one matrix; `proj` holds it as the convolution that timm stores."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.proj = fold_input_standardisation(nn.Conv2d(config.channels, config.dim, config.patch, config.patch))

    def project(self, patches: Tensor) -> Tensor:
        """B N C·P·P -> B N D, each patch for itself: those that nobody needs can be left out before."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(patchify(images, self.patch))  # B N D


class ConvStem(nn.Module):
    """Images to tokens by 3x3 convolutions that halve the image until a pixel is a patch, then a 1x1 one.

    Without norms, unlike the paper's batch norm: a token then depends on its neighbourhood alone, not on what it is batched or packed
    with nor on how much air surrounds the breast, and keeps the contrast that tells a lesion from noise (a norm over each pixel's
    channels loses it, and the model did not learn).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        halvings = config.patch.bit_length() - 1
        widths = [config.channels] + [config.dim // 2**i for i in reversed(range(halvings))]
        convs = [nn.Conv2d(*pair, 3, stride=2, padding=1) for pair in itertools.pairwise(widths)]
        for conv in convs:
            if not conv.weight.is_meta:
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # keeps the variance through the ReLUs
        fold_input_standardisation(convs[0])
        self.convs = nn.ModuleList(convs)
        self.proj = nn.Conv2d(config.dim, config.dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = images  # B C H W
        for conv in self.convs:
            x = F.relu(conv(x))  # B D/2^i H/2^j W/2^j
        return self.proj(x).flatten(2).transpose(1, 2)  # B N D


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def project_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head: B T D -> 3 x (B A T D/A)."""
        q, k, v = linear(x, self.qkv).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attention_weights(self, x: Tensor) -> Tensor:
        """How much each token attends to each other, written out for inspection: B T D -> B A T T, rows sum to 1."""
        q, k, _ = self.project_qkv(x)
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)

    def forward(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        mixed = layout.attend(*self.project_qkv(x)).transpose(1, 2).flatten(2)  # B T D
        return linear(mixed, self.proj)


class Mlp(nn.Module):
    """Two layers with a GELU between, each token for itself."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.fc1, self.fc2)  # B T D


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention, then MLP: each normalised before, scaled and in training now and then skipped after, and added to the stream."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if config.layer_scale is None else LayerScale(config.dim, config.layer_scale)

        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(config.dim, config.eps)
        self.mlp = Mlp(config)
        self.ls2 = scale()

    def apply_drop_path(self, branch: Tensor, layout: SequenceLayout) -> Tensor:
        """Stochastic depth per image, scaled so that the expectation stays."""
        if not self.training or self.drop_path == 0:
            return branch
        return branch * ((layout.sample_per_image(branch) >= self.drop_path) / (1 - self.drop_path)).to(branch.dtype)

    def forward(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        x = x + self.apply_drop_path(self.ls1(self.attn(self.norm1(x), layout)), layout)  # B T D
        return x + self.apply_drop_path(self.ls2(self.mlp(self.norm2(x))), layout)  # B T D


class AttentionPool(nn.Module):
    """One learned query attends to the patches, then an MLP: timm's `AttentionPoolLatent`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.latent = nn.Parameter(torch.empty(1, 1, config.dim))
        self.q = nn.Linear(config.dim, config.dim)
        self.kv = nn.Linear(config.dim, 2 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, config.eps)
        self.mlp = Mlp(config)

    def forward(self, patches: Tensor) -> Tensor:
        q = (
            self.q(self.latent).unflatten(-1, (self.heads, -1)).transpose(1, 2).expand(patches.shape[0], -1, -1, -1)
        )  # B A 1 D/A
        k, v = self.kv(patches).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # B A N D/A
        x = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # B 1 D
        return (x + self.mlp(self.norm(x))).squeeze(1)  # B D


class Head(nn.Linear):
    """From what the pool reads to logits; a class of its own, by which a sharded model holds it apart from the body."""


def init_linear_layers(module: nn.Module) -> None:
    """Truncated normals of deviation 0.02 for all matrices of `module`, 0 for their biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)


class ViT(nn.Module):
    """A Vision Transformer, a `torch.nn.Module`: images `(B, C, H, W)` in [0, 1] to logits `(B, K)`.

    `forward` is `head(pool(encode(embed(images))))`; `encode` also runs on tokens that were made otherwise.

    Args:
        config: Sizes and parts. Images of another size than `config.image_size` are taken, too; positions are then resized.

    Examples:
        >>> import torch
        >>> vit = vitmodel.ViT(vitmodel.ViTConfig(image_size=(64, 32), dim=64, depth=2, heads=2))
        >>> vit(torch.zeros(3, 1, 64, 32)).shape
        torch.Size([3, 1])
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each block in the backward pass: less memory, more time
        self.patch_embed = LinearStem(config) if config.stem == "linear" else ConvStem(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.reg_token = nn.Parameter(torch.empty(1, config.registers, config.dim)) if config.registers else None
        self.pos_embed = nn.Parameter(torch.empty(1, *config.grid, config.dim))
        drops = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, drop) for drop in drops)
        # the mean is taken before the norm, the other pools after it; timm calls the former `fc_norm`
        self.norm = nn.Identity() if config.pool == "mean" else nn.LayerNorm(config.dim, config.eps)
        self.attn_pool = AttentionPool(config) if config.pool == "attention" else None
        self.fc_norm = nn.LayerNorm(config.dim, config.eps) if config.pool == "mean" else nn.Identity()
        self.head = Head(config.dim, config.classes)
        self.reset_parameters()

    @classmethod
    def from_pretrained(cls, path: str | Path, **overrides: Any) -> ViT:
        """Return a ViT with weights of timm, Hugging Face, Google (.npz), DINO, DINOv2, MAE or vitmodel, in evaluation mode.

        Sizes follow from the file. The input normalisation of published weights is folded into the patch embedding and their three
        colour channels are summed, so that the network takes grey images in [0, 1]. The file's head is kept.

        Args:
            path: A file of weights, or a folder as on a hub or of a model package. Code in a file is never run.
            **overrides: Fields of `ViTConfig` that differ from the file's, such as `image_size=(1024, 512)` (positions are resized),
                `classes=1` (a fresh head), `pool="mean"` or `channels=3` (colour images in [0, 1]).

        Returns:
            The network: images `(B, C, H, W)` to logits `(B, K)`.

        Raises:
            UsageError: The file holds no such network, or an override does not fit it.
            VitmodelError: The file cannot be read.

        Examples:
            >>> import torch
            >>> vit = vitmodel.ViT.from_pretrained("run/package", image_size=(64, 32))
            >>> vit(torch.zeros(1, 1, 64, 32)).shape
            torch.Size([1, 1])
        """
        from vitmodel.model.pretrained import vit_from_weights

        return vit_from_weights(path, **overrides)

    def reset_parameters(self) -> None:
        """Truncated normals of deviation 0.02 for matrices and tokens, 0 for biases; the stems draw their own."""
        init_linear_layers(self)
        for token in (self.cls_token, self.reg_token, self.pos_embed, getattr(self.attn_pool, "latent", None)):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings of a grid of patches, row by row: 1 N D."""
        return resize_positions(self.pos_embed, grid).flatten(1, 2)

    def prefix_tokens(self) -> Tensor:
        """The tokens that go before an image's patches: 1 R D."""
        return self.cls_token if self.reg_token is None else torch.cat([self.cls_token, self.reg_token], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """Images to tokens with positions: B C H W -> B T D. Raises UsageError for a wrong shape."""
        if images.ndim != 4 or images.shape[1] != self.config.channels:
            raise UsageError(
                f"images must have shape B x {self.config.channels} x H x W, not {'x'.join(map(str, images.shape))}"
            )
        grid = patch_grid((images.shape[-2], images.shape[-1]), self.config.patch)
        patches = self.patch_embed(images) + self.positions(grid)  # B N D
        return torch.cat([self.prefix_tokens().expand(patches.shape[0], -1, -1), patches], dim=1)  # B T D

    def encode(self, tokens: Tensor, layout: SequenceLayout = DENSE_LAYOUT) -> Tensor:
        """The blocks and the norm after them: B T D -> B T D."""
        for number, block in enumerate(self.blocks):
            tokens = layout.prepare_block_input(number, tokens)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, layout, use_reentrant=False)
            else:
                tokens = block(tokens, layout)
        return self.norm(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        """Encoded tokens to one feature vector per image: B T D -> B D."""
        if self.config.pool == "cls":
            return tokens[:, 0]
        patches = tokens[:, self.config.num_prefix_tokens :]
        return self.fc_norm(patches.mean(dim=1)) if self.attn_pool is None else self.attn_pool(patches)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits: B C H W -> B K."""
        return self.head(self.pool(self.encode(self.embed(images))))
