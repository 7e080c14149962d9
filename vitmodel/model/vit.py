"""The Vision Transformer: images to tokens, to features, to logits.

The network of Dosovitskiy et al. 2021 (arXiv 2010.11929) with pre-norm blocks and timm's parameter names. Two
parameters differ in shape from timm's, so that the weights fit images and packs of any shape; `weights.py` converts
both without changing the function:

- `pos_embed` keeps the grid: `(1, h, w, D)`. The class token has no position embedding of its own; the sum of the two
  is stored in `cls_token`.
- `patch_embed.proj` has one input channel.

Symbols in shapes:

- `B` images, `C` channels, `H` and `W` height and width in pixels, `P` side of a patch in pixels
- `h` and `w` rows and columns of patches (`h = H / P`), `N = h * w` patches
- `R` prefix tokens (the class token and the registers), `T = R + N` tokens, `D` width of a token
- `A` attention heads, `K` classes
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
    """Cut images `(B, C, H, W)` into flattened patches `(B, N, C * P * P)`.

    Patches are in row-major order; each is flattened in the order of a convolution kernel's weights.
    """
    h, w = patch_grid((images.shape[-2], images.shape[-1]), patch)
    return images.unflatten(3, (w, patch)).unflatten(2, (h, patch)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def resize_positions(positions: Tensor, grid: tuple[int, int], antialias: bool = True) -> Tensor:
    """Resize position embeddings `(1, h, w, D)` to another grid by bicubic interpolation.

    Args:
        positions: Position embeddings `(1, h, w, D)`.
        grid: New rows and columns `(h', w')`.
        antialias: Whether a smaller grid averages over all positions that fall into one of its cells.

    Returns:
        Position embeddings `(1, h', w', D)`.
    """
    if positions.shape[1:3] == grid:
        return positions
    resized = F.interpolate(positions.float().permute(0, 3, 1, 2), size=grid, mode="bicubic", antialias=antialias)
    return resized.permute(0, 2, 3, 1).to(positions.dtype)


class SequenceLayout:
    """How images share a tensor of tokens: one image per row, `(B, T, D)`.

    `PackedLayout` puts many images into one row and overrides `attend` and `sample_per_image`.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the softmax attention of each token to the tokens of its own image.

        Args:
            q: Queries `(B, A, T, D / A)`.
            k: Keys, of the same shape.
            v: Values, of the same shape.

        Returns:
            Weighted sums of the values `(B, A, T, D / A)`.
        """
        return F.scaled_dot_product_attention(q, k, v)

    def sample_per_image(self, x: Tensor) -> Tensor:
        """Return one uniform random number in [0, 1) per image of `x` `(B, T, D)`.

        The shape, here `(B, 1, 1)`, broadcasts over the tokens of each image.
        """
        return torch.rand(x.shape[0], 1, 1, device=x.device)

    def prepare_block_input(self, index: int, x: Tensor) -> Tensor:
        """Transform the tokens that enter block `index`, `(B, T, D)`, without changing their shape; here unchanged."""
        return x


DENSE_LAYOUT = SequenceLayout()


def fold_input_standardisation(conv: nn.Conv2d) -> nn.Conv2d:
    """Fold the standardisation of crops into a newly initialised first layer, and return the layer.

    The pixels of a crop have a mean and a standard deviation of about 0.25. On the meta device, whose tensors are later
    replaced by those of a package, nothing is computed: torch would import its compiler for it.
    """
    if conv.weight.is_meta:
        return conv
    with torch.no_grad():
        conv.weight.mul_(4)
        if conv.bias is not None:
            conv.bias.sub_(conv.weight.sum((1, 2, 3)) / 4)
    return conv


class LinearStem(nn.Module):
    """Patch embedding by one matrix; `proj` stores it as a convolution, as timm does."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.proj = fold_input_standardisation(nn.Conv2d(config.channels, config.dim, config.patch, config.patch))

    def project(self, patches: Tensor) -> Tensor:
        """Project patches `(B, N, C * P * P)` to tokens `(B, N, D)`.

        Each patch is projected independently, so patches that are not needed can be removed first.
        """
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens `(B, N, D)` of images `(B, C, H, W)`."""
        return self.project(patchify(images, self.patch))


class ConvStem(nn.Module):
    """Patch embedding by strided 3x3 convolutions, which halve the image until a pixel is a patch, and a final 1x1 one.

    After Xiao et al. 2021 (arXiv 2106.14881), but without their batch norm: a token then depends only on its
    neighbourhood, not on the other images of the batch or pack nor on the amount of air around the breast. A norm over
    the channels of each pixel is no replacement: it removes the contrast that distinguishes a lesion from noise, and
    the model did not learn.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        halvings = config.patch.bit_length() - 1
        widths = [config.channels] + [config.dim // 2**i for i in reversed(range(halvings))]
        convs = [nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in itertools.pairwise(widths)]
        for conv in convs:
            if not conv.weight.is_meta:
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # keeps the variance through the ReLUs
        fold_input_standardisation(convs[0])
        self.convs = nn.ModuleList(convs)
        self.proj = nn.Conv2d(config.dim, config.dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens `(B, N, D)` of images `(B, C, H, W)`."""
        x = images
        for conv in self.convs:
            x = F.relu(conv(x))  # halves height and width, ends at (B, D, h, w)
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def project_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values of all heads, each `(B, A, T, D / A)`, for tokens `(B, T, D)`."""
        q, k, v = linear(x, self.qkv).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attention_weights(self, x: Tensor) -> Tensor:
        """Return the attention weights `(B, A, T, T)` for tokens `(B, T, D)`; each row sums to 1.

        Only for inspection: `forward` never builds this matrix.
        """
        q, k, _ = self.project_qkv(x)
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)

    def forward(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """Return the attention output `(B, T, D)` for tokens `(B, T, D)`."""
        mixed = layout.attend(*self.project_qkv(x)).transpose(1, 2).flatten(2)
        return linear(mixed, self.proj)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, applied to each token independently."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens `(B, T, D)` for tokens `(B, T, D)`."""
        return linear(x, self.fc1, self.fc2)


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block: residual attention, then a residual MLP, with layer scale and stochastic depth."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()

        def make_layer_scale() -> nn.Module:
            return nn.Identity() if config.layer_scale is None else LayerScale(config.dim, config.layer_scale)

        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.ls1 = make_layer_scale()
        self.norm2 = nn.LayerNorm(config.dim, config.eps)
        self.mlp = Mlp(config)
        self.ls2 = make_layer_scale()

    def apply_drop_path(self, branch: Tensor, layout: SequenceLayout) -> Tensor:
        """Apply stochastic depth per image to a branch `(B, T, D)`; the scaling preserves the expected value."""
        if not self.training or self.drop_path == 0:
            return branch
        return branch * ((layout.sample_per_image(branch) >= self.drop_path) / (1 - self.drop_path)).to(branch.dtype)

    def forward(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """Return the block's output `(B, T, D)` for tokens `(B, T, D)`."""
        x = x + self.apply_drop_path(self.ls1(self.attn(self.norm1(x), layout)), layout)
        return x + self.apply_drop_path(self.ls2(self.mlp(self.norm2(x))), layout)


class AttentionPool(nn.Module):
    """Pooling by one learned query that attends to the patches, followed by an MLP: timm's `AttentionPoolLatent`."""

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
        """Return one feature vector per image, `(B, D)`, for encoded patches `(B, N, D)`."""
        query = self.q(self.latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (1, A, 1, D / A)
        q = query.expand(patches.shape[0], -1, -1, -1)
        k, v = self.kv(patches).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, A, N, D / A) each
        x = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, 1, D)
        return (x + self.mlp(self.norm(x))).squeeze(1)


class Head(nn.Linear):
    """The linear layer from features `(B, D)` to logits `(B, K)`.

    It has its own class so that a sharded model can treat it separately from the body.
    """


def init_linear_layers(module: nn.Module) -> None:
    """Initialise all linear layers of `module`: weights from a truncated normal (standard deviation 0.02), biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class ViT(nn.Module):
    """A Vision Transformer, a `torch.nn.Module`: images `(B, C, H, W)` in [0, 1] to logits `(B, K)`.

    `forward` is `head(pool(encode(embed(images))))`. `encode` also accepts tokens from another source, such as a pack.

    Args:
        config: Sizes and components. Images may differ in size from `config.image_size`; the position embeddings are
            then resized.

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
        # mean pooling comes before the norm (timm's `fc_norm`), the other poolings after it
        self.norm = nn.Identity() if config.pool == "mean" else nn.LayerNorm(config.dim, config.eps)
        self.attn_pool = AttentionPool(config) if config.pool == "attention" else None
        self.fc_norm = nn.LayerNorm(config.dim, config.eps) if config.pool == "mean" else nn.Identity()
        self.head = Head(config.dim, config.classes)
        self.reset_parameters()

    @classmethod
    def from_pretrained(cls, path: str | Path, **overrides: Any) -> ViT:
        """Return a ViT with weights of timm, Hugging Face, Google, DINO, DINOv2, MAE, ONNX or vitmodel, in eval mode.

        The sizes are read from the file. The input normalisation of published weights is folded into the patch
        embedding and their three colour channels are summed, so that the network takes grey images in [0, 1]. The
        file's head is kept.

        Args:
            path: A weight file, a folder downloaded from a model hub, a model package, or a name such as dinov2-small
                or hf:org/name, which is downloaded. Code in a file is never run.
            **overrides: Fields of `ViTConfig` that differ from the file's, such as `image_size=(1024, 512)` (positions
                are resized), `classes=1` (a new head), `pool="mean"` or `channels=3` (colour images in [0, 1]).

        Returns:
            The network: images `(B, C, H, W)` to logits `(B, K)`.

        Raises:
            UsageError: The file contains no Vision Transformer, or an override does not fit it.
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
        """Initialise matrices and tokens from a truncated normal (standard deviation 0.02) and biases with 0.

        The stems initialise their convolutions themselves.
        """
        init_linear_layers(self)
        for token in (self.cls_token, self.reg_token, self.pos_embed, getattr(self.attn_pool, "latent", None)):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the position embeddings `(1, N, D)` of a grid of patches, in row-major order."""
        return resize_positions(self.pos_embed, grid).flatten(1, 2)

    def prefix_tokens(self) -> Tensor:
        """Return the tokens that precede an image's patches, `(1, R, D)`."""
        return self.cls_token if self.reg_token is None else torch.cat([self.cls_token, self.reg_token], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens with positions `(B, T, D)` of images `(B, C, H, W)`.

        Raises:
            UsageError: The images have the wrong number of dimensions or channels, or the patches do not fill them
                exactly.
        """
        channels = self.config.channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise UsageError(
                f"images: the shape is {tuple(images.shape)}, but the network takes (B, {channels}, H, W); "
                "reshape the images or build the network with other channels"
            )
        grid = patch_grid((images.shape[-2], images.shape[-1]), self.config.patch)
        patches = self.patch_embed(images) + self.positions(grid)  # (B, N, D)
        return torch.cat([self.prefix_tokens().expand(patches.shape[0], -1, -1), patches], dim=1)

    def encode(self, tokens: Tensor, layout: SequenceLayout = DENSE_LAYOUT) -> Tensor:
        """Return the tokens after all blocks and the final norm, `(B, T, D)`, for embedded tokens `(B, T, D)`.

        Args:
            tokens: Embedded tokens `(B, T, D)`.
            layout: How images share the tensor, such as a `PackedLayout`.
        """
        for index, block in enumerate(self.blocks):
            tokens = layout.prepare_block_input(index, tokens)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, layout, use_reentrant=False)
            else:
                tokens = block(tokens, layout)
        return self.norm(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        """Return one feature vector per image, `(B, D)`, for encoded tokens `(B, T, D)`."""
        if self.config.pool == "cls":
            return tokens[:, 0]
        patches = tokens[:, self.config.num_prefix_tokens :]
        return self.fc_norm(patches.mean(dim=1)) if self.attn_pool is None else self.attn_pool(patches)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(B, K)` of images `(B, C, H, W)`."""
        return self.head(self.pool(self.encode(self.embed(images))))
