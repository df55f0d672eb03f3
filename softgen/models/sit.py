"""A small diffusion transformer on continuous latents: the velocity of a linear interpolant (SiT, arXiv 2401.08740).

Shape legend: B batch, L latent tokens, D latent dimension, d width.
"""

import math

import torch
from torch import Tensor, nn

from softgen.categorical import check_token_range
from softgen.models.blocks import Activation, Modulation, TransformerBlock, check_transformer, modulate
from softgen.models.conditions import Asked, ClassCondition, Condition
from softgen.pretrained import Pretrained
from softgen.relaxation import widen

_FREQUENCIES, _LONGEST_PERIOD = 256, 10_000.0


class SiT(Pretrained):
    """v(x_t, t, class) for x_t = (1 - t) x_0 + t eps, which is to be E[eps - x_0 | x_t].

    Args:
        num_latents: L, tokens an image.
        latent_dim: D.
        num_classes: Classes; 0 for an unconditional model.
        width: d.
        depth: Number of blocks.
        heads: Attention heads; divides `width`.
        mlp_ratio: Inner width of the feed-forward as a multiple of `width`.
        activation: Of the feed-forward.

    At the start every block is the identity and the velocity is 0 (adaLN-zero, arXiv 2212.09748).

    Attributes:
        has_null_condition: Whether there is an unconditional branch, as guidance needs.

    Raises:
        ValueError: If a size is impossible.
    """

    def __init__(
        self,
        *,
        num_latents: int,
        latent_dim: int,
        num_classes: int = 0,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        check_transformer(
            num_codes=1,
            num_sites=1,
            num_classes=num_classes,
            width=width,
            depth=depth,
            heads=heads,
            activation=activation,
        )
        for name, value in (("num_latents", num_latents), ("latent_dim", latent_dim)):
            if value < 1:
                raise ValueError(f"model.{name}: expected at least 1, got {value}")
        self.config = {
            "num_latents": num_latents,
            "latent_dim": latent_dim,
            "num_classes": num_classes,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "activation": activation,
        }
        self.num_latents, self.latent_dim, self.num_classes = num_latents, latent_dim, num_classes
        self.has_null_condition = num_classes > 0
        self.input = nn.Linear(latent_dim, width)
        self.position = nn.Parameter(torch.randn(num_latents, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads=heads, mlp_ratio=mlp_ratio, activation=activation) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = Modulation(width, chunks=2)
        self.output = nn.Linear(width, latent_dim)
        self._reset()

    def _reset(self) -> None:
        for module in (self.input, self.time, self.blocks):
            for linear in module.modules():
                if isinstance(linear, nn.Linear):
                    nn.init.xavier_uniform_(linear.weight)
                    nn.init.zeros_(linear.bias)
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            linear = block.modulation.linear
            nn.init.zeros_(linear.weight)
            # The block multiplies what it adds by 1 + gate.
            with torch.no_grad():
                for gate in (2, 5):
                    linear.bias.view(6, -1)[gate] = -1
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def encode(self, asked: Asked) -> ClassCondition:
        """Make the condition from class labels, (B,) of any integer type.

        Raises:
            ValueError: If prompts are given, or (looked at on a CPU alone) there is no such class.
        """
        if not isinstance(asked, Tensor):
            raise ValueError("conditions: expected class labels, since this model is class-conditional, got prompts")
        check_token_range(asked, max(1, self.num_classes) - 1, key="labels")
        return ClassCondition.of(asked.long())

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Velocity (B, L, D), float32 at least.

        Args:
            x_t: Normalised latents, noised, (B, L, D).
            t: Times in [0, 1], (B,): 0 is the data, 1 is noise.
            condition: B classes, some perhaps dropped.
        """
        assert isinstance(condition, ClassCondition)
        labels = condition.labels.masked_fill(condition.dropped, self.num_classes)
        if self.num_classes == 0:
            labels = torch.zeros_like(labels)
        told = self.time(_waves(t).to(self.position.dtype)) + self.class_embedding(labels)
        x = self.input(x_t.to(self.position.dtype)) + self.position
        for block in self.blocks:
            x = block(x, told)
        shift, scale = self.modulation(told)
        return widen(self.output(modulate(self.norm(x), shift=shift, scale=scale)))


def _waves(t: Tensor) -> Tensor:
    """Cosines and sines of 1000 t, (B, 256)."""
    half = _FREQUENCIES // 2
    rates = torch.exp(-math.log(_LONGEST_PERIOD) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = 1000 * t.float().unsqueeze(1) * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)
