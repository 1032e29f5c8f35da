"""DiT and Latte as their papers' own code has them, plainly: what ours are measured against.

Modules have the public names, so that a public checkpoint is a state dict of these. Images are
(B, C, H, W), and videos (B, F, C, H, W) with the condition repeated for every frame and token.
Attention is explicit softmax, as in Latte's default. DiT takes its own from timm, where explicit
softmax has given way to PyTorch's fused attention; here it has whichever is faster.
"""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from mmsora.models.layers.position import sincos_1d, sincos_2d

__all__ = ["DiT", "Latte"]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens (N, T, D), each sequence with its own shift and scale (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """Multi-head self-attention, tokens (N, T, D).

    ``fused`` is PyTorch's own; gradients on a CPU are faster without it.
    """

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused and (x.is_cuda or not torch.is_grad_enabled()):
            out = functional.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention and perceptron under adaLN-Zero, tokens (N, T, D), condition (N, D)."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, fused)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        vectors = self.adaLN_modulation(c).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class PatchEmbed(nn.Module):
    """A strided convolution, (N, C, H, W) to (N, T, D)."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoid of 256 channels and a perceptron, (N,) to (N, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10000) * steps / 128)[None]
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class LabelEmbedder(nn.Module):
    """A table with one more row for "no label"."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    """Norm under adaLN and the linear head."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The image model (arXiv:2212.09748).

    Args:
        side: Height and width of the latent.
        patch: Side of a patch.
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads.
        classes: Class labels.
        channels: Channels of the latent; the output has twice as many.
        fused: Whether attention is PyTorch's own where that is faster.
    """

    def __init__(
        self,
        side: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        channels: int = 4,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.grid, self.patch, self.channels = side // patch, patch, 2 * channels
        self.x_embedder = PatchEmbed(channels, width, patch)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)
        table = sincos_2d(self.grid, self.grid, width).float()[None]
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, fused) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch, self.channels)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens (N, T, patch * patch * channels) to (N, channels, H, W)."""
        g, p = self.grid, self.patch
        x = x.reshape(x.shape[0], g, g, p, p, self.channels)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(x.shape[0], self.channels, g * p, g * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Images (N, C, H, W), clock (N,) and labels (N,) to (N, 2 C, H, W)."""
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


class Latte(DiT):
    """The video model, variant 1 (arXiv:2401.03048).

    Args:
        frames: Frames of the latent.
        side: Its height and width.
        patch: Side of a patch.
        width: Width of the tokens.
        depth: Number of blocks, spatial and temporal in turn.
        heads: Attention heads.
        classes: Class labels.
    """

    def __init__(
        self, frames: int, side: int, patch: int, width: int, depth: int, heads: int, classes: int
    ) -> None:
        super().__init__(side, patch, width, depth, heads, classes, fused=False)
        table = sincos_1d(torch.arange(frames), width).float()[None]
        self.temp_embed = nn.Parameter(table, requires_grad=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Videos (B, F, C, H, W), clock (B,) and labels (B,) to (B, F, 2 C, H, W)."""
        batch, frames = x.shape[:2]
        x = rearrange(x, "b f c h w -> (b f) c h w")
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        per_frame = repeat(c, "b d -> (b f) d", f=frames)
        per_token = repeat(c, "b d -> (b n) d", n=x.shape[1])
        for i in range(0, len(self.blocks), 2):
            x = self.blocks[i](x, per_frame)
            x = rearrange(x, "(b f) n d -> (b n) f d", b=batch)
            if i == 0:
                x = x + self.temp_embed
            x = self.blocks[i + 1](x, per_token)
            x = rearrange(x, "(b n) f d -> (b f) n d", b=batch)
        x = self.unpatchify(self.final_layer(x, per_frame))
        return rearrange(x, "(b f) c h w -> b f c h w", b=batch)
