"""The linear interpolant between data and noise, as SiT has it (arXiv 2401.08740): x_t = (1 - t) x_0 + t eps.

Shape legend: B batch, L latent tokens, D latent dimension.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from softgen.models.conditions import Condition

TimeLaw = Literal["uniform", "logit_normal"]
Method = Literal["euler", "heun"]


class NormalSource(Protocol):
    """Standard normal draws, one row a sample, as `softgen.random.SampleRandom` gives."""

    def normal(self, *shape: int) -> Tensor:
        """Draws of shape (B, *shape)."""
        ...


class FlowNoise(NormalSource, Protocol):
    """Also uniform draws."""

    def uniform(self, *shape: int) -> Tensor:
        """Draws in [0, 1), shape (B, *shape)."""
        ...


class VelocityModel(Protocol):
    """What a sampler follows, such as `softgen.models.SiT`.

    Attributes:
        num_latents: L.
        latent_dim: D.
        has_null_condition: Whether dropping the condition is defined.
    """

    num_latents: int
    latent_dim: int
    has_null_condition: bool

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Velocity (B, L, D) at x_t (B, L, D) and t (B,)."""
        ...


def draw_times(law: TimeLaw, noise: FlowNoise, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Times (B,) to train at: `uniform` in [0, 1), or `logit_normal`, sigmoid(mean + std n) (arXiv 2403.03206).

    Raises:
        ValueError: If the law is unknown.
    """
    if law not in get_args(TimeLaw):
        raise ValueError(f"time_law: expected one of {', '.join(get_args(TimeLaw))}, got {law!r}")
    return noise.uniform() if law == "uniform" else torch.sigmoid(mean + std * noise.normal())


def interpolate(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps of shape (B, L, D), at times (B,)."""
    return torch.lerp(x_0, eps, t.view(-1, 1, 1).to(x_0.dtype))


def velocity_loss(velocity: Tensor, x_0: Tensor, eps: Tensor) -> Tensor:
    """Mean over all numbers of |v - (eps - x_0)|^2, the derivative of `interpolate` in t; scalar."""
    return (velocity - (eps - x_0)).square().mean()


@dataclass(frozen=True)
class FlowSampler:
    """Follows the velocity from noise at t = 1 to data at t = 0, in steps of equal length.

    Args:
        steps: At least 1.
        method: `euler`, one pass a step, or `heun`, two, of second order.
        guidance: Scale s of classifier-free guidance, v_null + s (v - v_null); 1 is off and costs one pass, not two.
        guidance_interval: Times within which guidance is on (arXiv 2404.07724), both in [0, 1]; (0, 0.7) in
            SoftVQ-VAE.

    Raises:
        ValueError: If an argument is out of range.
    """

    steps: int = 25
    method: Method = "heun"
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if self.method not in get_args(Method):
            raise ValueError(f"sampler: expected one of {', '.join(get_args(Method))}, got {self.method!r}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance: expected a scale of at least 0 (1 turns guidance off), got {self.guidance}")
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise ValueError(
                f"guidance_interval: expected two rising numbers in [0, 1], got {list(self.guidance_interval)}"
            )

    def check(self, model: VelocityModel) -> None:
        """Refuse guidance that the model cannot give.

        Raises:
            ValueError: If it has no null condition.
        """
        if self.guidance != 1 and not model.has_null_condition:
            raise ValueError(f"guidance: expected 1, since this model has no null condition, got {self.guidance}")

    @torch.no_grad()
    def __call__(self, model: VelocityModel, condition: Condition, noise: NormalSource) -> Tensor:
        """Normalised latents (B, L, D) for the B conditions; the noise is that at t = 1.

        Raises:
            ValueError: If guidance is asked of a model without a null condition.
        """
        self.check(model)
        x = noise.normal(model.num_latents, model.latent_dim)
        # From integers, so that every run sees the same times to the last bit.
        times = [1 - step / self.steps for step in range(self.steps + 1)]
        for now, then in pairwise(times):
            velocity = self._velocity(model, x, now, condition)
            if self.method == "heun":
                ahead = self._velocity(model, x + (then - now) * velocity, then, condition)
                velocity = (velocity + ahead) / 2
            x = x + (then - now) * velocity
        return x

    def _velocity(self, model: VelocityModel, x: Tensor, time: float, condition: Condition) -> Tensor:
        t = torch.full((len(x),), time, dtype=torch.float32, device=x.device)
        low, high = self.guidance_interval
        if self.guidance == 1 or not low <= time <= high:
            return model(x, t, condition)
        both = model(torch.cat([x, x]), torch.cat([t, t]), type(condition).cat([condition, condition.drop()]))
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, self.guidance)
