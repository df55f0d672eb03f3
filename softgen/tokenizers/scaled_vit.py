"""The ViT of SoftVQ-VAE: scaled residual branches, under timm's names, as DINOv2 has it.

Shape legend: B batch, P patches, L latent tokens, W width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_SCALE = 1e-5
"""What the factors of the residual branches start at, as released."""


class _Attention(nn.Module):
    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return out


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class _Scale(nn.Module):
    def __init__(self, width: int, *, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, width: int, *, heads: int, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads=heads)
        self.ls1 = _Scale(width, start=layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _MLP(width)
        self.ls2 = _Scale(width, start=layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x


class _PatchEmbed(nn.Module):
    def __init__(self, width: int, *, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return patches


class ScaledViT(nn.Module):
    """A ViT with a class token and scaled residual branches, under timm's names, as DINOv2 has it.

    Args:
        image_size: Pixels a side.
        patch_size: Pixels a side of a patch.
        width: W.
        depth: Number of blocks.
        heads: Attention heads; divides W.
        layer_scale: What the factors of the residual branches start at.
        embeds: Whether it embeds patches; a decoder is given mask tokens instead.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        layer_scale: float = LAYER_SCALE,
        embeds: bool = True,
    ) -> None:
        super().__init__()
        self.num_patches = (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, self.num_patches + 1, width) * 0.02)
        if embeds:
            self.patch_embed = _PatchEmbed(width, patch_size=patch_size)
        self.blocks = nn.ModuleList(_Block(width, heads=heads, layer_scale=layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, patches: Tensor, latents: Tensor | None = None) -> Tensor:
        """States (B, 1 + P + L, W) of class token, embedded patches (B, P, W) and latents (B, L, W)."""
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1).to(patches.dtype), patches], dim=1) + self.pos_embed
        if latents is not None:
            x = torch.cat([x, latents.to(x.dtype)], dim=1)
        for block in self.blocks:
            x = block(x)
        states: Tensor = self.norm(x)
        return states

    def features(self, images: Tensor) -> Tensor:
        """States of the patches (B, P, W) of images (B, 3, H, W) in the model's own range."""
        states: Tensor = self(self.patch_embed(images))
        return states[:, 1:]
