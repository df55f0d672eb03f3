"""One-step generators: a masked diffusion model and the initial tokens that it maps to an image in one pass."""

import math
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from softgen.categorical import UniformSource, sample_categorical
from softgen.masking import exact_mask
from softgen.models.base import MaskedDiffusionModel
from softgen.models.conditions import Condition
from softgen.pretrained import Pretrained

MaskUnit = Literal["site", "token"]


class NoiseSource(UniformSource, Protocol):
    """Uniform, integer and normal draws, one row a sample, as `softgen.random.SampleRandom` gives."""

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), shape (B, *shape)."""
        ...

    def normal(self, *shape: int) -> Tensor:
        """Standard normal draws, shape (B, *shape)."""
        ...


class OneStepGenerator(Pretrained):
    """Di[M]O's student (arXiv 2503.15457): x_init -> logits of all sites -> tokens, in one pass.

    Args:
        model: The network, initialised from the teacher.
        r_init: Share of the initial tokens that are masks; the others are random codes. In [0, 1].
        noise: Weight s of the Gaussian noise on the initial embeddings, e <- s eps + sqrt(1 - s^2) e. In [0, 1].
        logit_scale: Multiplies the network's logits, above 0.
        metadata: Facts to keep with the weights (the teacher's guidance, the steps trained); JSON values.
        mask_unit: What the share is counted in: `site`s, each masked on its own, or `token`s, all sites of a token
            together. They differ only where a token has several sites, as in MaskBit.

    Raises:
        ValueError: If a number is out of range, or the sites do not divide evenly over the tokens.
    """

    def __init__(
        self,
        model: MaskedDiffusionModel,
        *,
        r_init: float = 0.6,
        noise: float = 0.1,
        logit_scale: float = 1.0,
        metadata: dict[str, Any] | None = None,
        mask_unit: MaskUnit = "site",
    ) -> None:
        super().__init__()
        for name, value in (("r_init", r_init), ("noise", noise)):
            if not 0 <= value <= 1:
                raise ValueError(f"generator.{name}: expected a number in [0, 1], got {value}")
        _check_scale(logit_scale, key="generator.logit_scale")
        if mask_unit not in get_args(MaskUnit):
            raise ValueError(f"generator.mask_unit: expected site or token, got {mask_unit!r}")
        if mask_unit == "token" and model.num_sites % model.num_tokens:
            raise ValueError(
                f"generator.mask_unit: expected site, since {model.num_sites} sites are no multiple of "
                f"{model.num_tokens} tokens, got 'token'"
            )
        model.check(key="generator.model")
        self.model = model
        self.r_init = r_init
        self.noise = noise
        self.mask_unit: MaskUnit = mask_unit
        self.metadata = dict(metadata or {})
        self.config = {
            "model": model,
            "r_init": r_init,
            "noise": noise,
            "logit_scale": logit_scale,
            "metadata": self.metadata,
            "mask_unit": mask_unit,
        }

    @property
    def logit_scale(self) -> float:
        """What the network's logits are multiplied by."""
        return float(self.config["logit_scale"])

    def scale_logits(self, factor: float) -> None:
        """Multiply all logits by a constant from now on; above 1 sharpens.

        Raises:
            ValueError: If the factor, or the scale that it leads to, is not finite and above 0.
        """
        _check_scale(factor, key="factor")
        _check_scale(self.logit_scale * factor, key="generator.logit_scale")
        self.config["logit_scale"] = self.logit_scale * factor

    def init_tokens(self, noise: NoiseSource) -> Tensor:
        """Draw x_init (B, N): random codes, and exactly max(1, round(r_init n)) masks (none for r_init 0).

        n is N, or with the mask unit `token` the number of tokens, whose sites are all masked.
        """
        sites = self.model.num_sites
        units = sites if self.mask_unit == "site" else self.model.num_tokens
        codes = noise.integers(self.model.num_codes, sites)
        count = max(1, round(self.r_init * units)) if self.r_init > 0 else 0
        counts = torch.full(codes.shape[:1], count, device=codes.device)
        masked = exact_mask(counts, noise.uniform(units)).repeat_interleave(sites // units, dim=1)
        return codes.masked_fill(masked, self.model.mask_id)

    def init(self, noise: NoiseSource) -> Tensor:
        """Draw the input embeddings e_in (B, L, d): embedded x_init, perturbed by noise.

        Args:
            noise: Draws, in this order: codes (B, N), mask positions (B, N), or (B, L)
                with the mask unit `token`, perturbation (B, L, d).
        """
        embeddings = self.model.embed(self.init_tokens(noise))
        if self.noise == 0:
            return embeddings
        perturbation = noise.normal(*embeddings.shape[1:]).to(embeddings.dtype)
        keep = math.sqrt(1 - self.noise**2)
        return self.noise * perturbation + keep * embeddings

    def logits(self, e_in: Tensor, condition: Condition) -> Tensor:
        """One pass: input embeddings (B, L, d) to logits (B, N, K)."""
        logits: Tensor = self.model(e_in, condition)
        return logits if self.logit_scale == 1 else logits * self.logit_scale

    def forward(self, e_in: Tensor, condition: Condition) -> Tensor:
        """As `logits`."""
        return self.logits(e_in, condition)

    @torch.no_grad()
    def sample(self, condition: Condition, noise: NoiseSource, *, temperature: float = 1.0) -> Tensor:
        """Tokens (B, N) for the B conditions, in one pass.

        Args:
            condition: From `model.encode`.
            noise: One stream a sample.
            temperature: Of the drawn codes; 0 takes the likeliest.
        """
        return sample_categorical(self.logits(self.init(noise), condition), noise, temperature=temperature)


def _check_scale(scale: float, *, key: str) -> None:
    if not 0 < scale < math.inf:
        raise ValueError(f"{key}: expected a finite number above 0, got {scale}")
