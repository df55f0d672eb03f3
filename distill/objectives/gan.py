"""GAN on the soft embedding: the frozen teacher sees, light heads judge (Soft-Di[M]O, OpenReview 83pHDDmkXt).

Shape legend: B batch, N sites, L vectors of width d, c width of the pooled condition.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from distill.objectives.base import DistillState, Objective, ObjectiveLosses
from softgen.masking import exact_mask
from softgen.models.base import MaskedDiffusionModel
from softgen.random import SampleRandom
from softgen.relaxation import Relaxation, full_precision, widen
from softgen.tokenizers.base import ImageTokenizer
from softgen.training.optimization import OptimizerConfig, ParameterGroup

Head = Literal["pooled", "per_token", "spatial"]
AdversarialLoss = Literal["hinge", "non_saturating"]
_SPATIAL_WIDTH = 16


class TokenHead(nn.Module):
    """Judges tokens, each told the condition; as `pooled` their mean, else each of them, and averages the verdicts.

    Args:
        width: d of the tokens.
        condition_dim: c.
        hidden: Inner width.
        pooled: Whether the mean over tokens is judged.
    """

    def __init__(self, *, width: int, condition_dim: int, hidden: int, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.judge = nn.Sequential(nn.Linear(width + condition_dim, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Verdicts (B,) on tokens (B, L, d) under the condition (B, c)."""
        if self.pooled:
            tokens = tokens.mean(dim=1, keepdim=True)
        told = condition.unsqueeze(1).expand(-1, tokens.shape[1], -1)
        verdicts: Tensor = self.judge(torch.cat([tokens, told], dim=-1))
        return verdicts.squeeze(-1).mean(dim=1)


class SpatialHead(nn.Module):
    """Judges a few numbers of every token side by side, so that it sees what is where.

    Args:
        length: L, number of tokens.
        width: d of the tokens.
        condition_dim: c.
        hidden: Inner width.
    """

    def __init__(self, *, length: int, width: int, condition_dim: int, hidden: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, _SPATIAL_WIDTH)
        self.judge = nn.Sequential(
            nn.Linear(length * _SPATIAL_WIDTH + condition_dim, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Verdicts (B,) on tokens (B, L, d) under the condition (B, c)."""
        seen = F.gelu(self.project(tokens)).flatten(1)
        verdicts: Tensor = self.judge(torch.cat([seen, condition], dim=-1))
        return verdicts.squeeze(-1)


class DiscriminatorHeads(nn.Module):
    """One small network a tapped layer, on its hidden states and the pooled condition.

    Args:
        layers: Number of tapped layers.
        length: L, number of hidden states of a layer.
        width: d of the hidden states.
        condition_dim: c.
        hidden: Inner width of each head.
        kind: `pooled` judges the mean over tokens; `per_token` each of them; `spatial` all of them together.
    """

    def __init__(self, *, layers: int, length: int, width: int, condition_dim: int, hidden: int, kind: Head) -> None:
        super().__init__()

        def head() -> nn.Module:
            if kind == "spatial":
                return SpatialHead(length=length, width=width, condition_dim=condition_dim, hidden=hidden)
            return TokenHead(width=width, condition_dim=condition_dim, hidden=hidden, pooled=kind == "pooled")

        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.heads = nn.ModuleList(head() for _ in range(layers))

    def forward(self, features: Sequence[Tensor], condition: Tensor) -> Tensor:
        """Verdicts (B, layers), float32: positive means real.

        Args:
            features: Hidden states (B, L, d), one a layer.
            condition: (B, c).
        """
        verdicts = []
        with full_precision(condition):
            for hidden, norm, head in zip(features, self.norms, self.heads, strict=True):
                tokens = norm(widen(hidden))
                verdicts.append(head(tokens, condition.to(tokens.dtype)))
        return torch.stack(verdicts, dim=1)


class GAN(Objective):
    """Discriminate real tokens from the student's soft ones inside the frozen teacher.

    Real and fake embeddings are masked by the same law, so that the teacher sees what it was trained on. The
    generator's gradient passes through the frozen backbone to the student's logits; the heads learn from the same
    features, detached.

    Args:
        taps: Layers of the teacher that are judged; by default all.
        head: `pooled`, `per_token` or `spatial`: what a head judges at once.
        head_width: Inner width of the heads.
        loss: `hinge` or `non_saturating`.
        mask_ratio: Bounds of the uniform law of the masked share, both in [0, 1); the paper uses [0, 0.95].
        relaxation: How the student's logits become embeddings.
        r1: Weight of the penalty |D(x + sigma eps) - D(x)|^2 / sigma^2 on real embeddings, an approximation of R1
            without a second backward pass (arXiv 2501.08316); 0 leaves it out.
        r2: The same on fake embeddings.
        penalty_noise: sigma of both.
        critic_only_steps: Steps at the start in which only critics learn.
        optimizer: Settings of the heads, which Adam trains alone.
        weight: w_gan, or `auto`: the gradient at the logits is held at `weight_ratio` times that of the first
            objective.
        weight_ratio: For `auto`, above 0.
    """

    name = "gan"
    relaxation: Relaxation
    needs_images = True
    needs_tokenizer = True

    def __init__(
        self,
        *,
        taps: Sequence[int] | None = None,
        head: Head = "pooled",
        head_width: int = 128,
        loss: AdversarialLoss = "hinge",
        mask_ratio: tuple[float, float] = (0.0, 0.95),
        relaxation: Relaxation = Relaxation(),  # noqa: B008 - frozen
        r1: float = 0.0,
        r2: float = 0.0,
        penalty_noise: float = 0.01,
        critic_only_steps: int = 0,
        optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, betas=(0.0, 0.99)),  # noqa: B008 - frozen
        weight: float | Literal["auto"] = 1.0,
        weight_ratio: float = 1.0,
    ) -> None:
        super().__init__(weight=weight, weight_ratio=weight_ratio)
        if head not in get_args(Head):
            raise ValueError(f"GAN.head: expected one of {', '.join(get_args(Head))}, got {head!r}")
        if loss not in get_args(AdversarialLoss):
            raise ValueError(f"GAN.loss: expected one of {', '.join(get_args(AdversarialLoss))}, got {loss!r}")
        if taps is not None and not taps:
            raise ValueError("GAN.taps: expected at least one layer, got none")
        if head_width < 1:
            raise ValueError(f"GAN.head_width: expected at least 1, got {head_width}")
        low, high = mask_ratio
        if not 0 <= low <= high < 1:
            raise ValueError(f"GAN.mask_ratio: expected two rising numbers in [0, 1), got {list(mask_ratio)}")
        for name, value in (("r1", r1), ("r2", r2), ("critic_only_steps", critic_only_steps)):
            if not value >= 0:
                raise ValueError(f"GAN.{name}: expected at least 0, got {value}")
        if not penalty_noise > 0:
            raise ValueError(f"GAN.penalty_noise: expected a number above 0, got {penalty_noise}")
        relaxation.check(key="GAN.relaxation")
        optimizer.check(key="GAN.optimizer")
        if optimizer.muon_lr is not None:
            raise ValueError(f"GAN.optimizer.muon_lr: expected none, got {optimizer.muon_lr}")
        self.taps = None if taps is None else list(taps)
        self.head = head
        self.head_width = head_width
        self.loss = loss
        self.mask_ratio = (low, high)
        self.relaxation = relaxation
        self.r1, self.r2, self.penalty_noise = r1, r2, penalty_noise
        self.critic_only_steps = critic_only_steps
        self.optimizer = optimizer
        self.heads: DiscriminatorHeads

    def setup(self, teacher: MaskedDiffusionModel, tokenizer: ImageTokenizer | None) -> None:
        """Build the heads for the teacher's layers."""
        taps = list(range(teacher.num_layers)) if self.taps is None else self.taps
        teacher.check_taps(taps, key="GAN.taps")
        self.taps = taps
        self.heads = DiscriminatorHeads(
            layers=len(taps),
            length=teacher.num_tokens,
            width=teacher.hidden_dim,
            condition_dim=teacher.condition_dim,
            hidden=self.head_width,
            kind=self.head,
        )

    def parameter_groups(self) -> Iterable[ParameterGroup]:
        """One group, `gan`."""
        yield ParameterGroup(self.name, list(self.heads.parameters()), self.optimizer)

    def forward(self, state: DistillState) -> ObjectiveLosses:
        """Judge real and fake; the fake features serve generator and heads alike."""
        noise = state.noise(self.name)
        condition = state.teacher.pool(state.condition)
        fake_input = self._fake_embeddings(state, noise)
        real_input = self._real_embeddings(state, noise)
        fake = self._features(state, fake_input)
        with torch.no_grad():
            real = self._features(state, real_input)

        frozen_heads = {name: value.detach() for name, value in self.heads.named_parameters()}
        generator = self._generator_loss(functional_call(self.heads, frozen_heads, (fake, condition)))
        on_real = self.heads(real, condition)
        on_fake = self.heads([hidden.detach() for hidden in fake], condition)
        critic = self._critic_loss(on_real, on_fake)
        for penalty, embeddings, verdicts in ((self.r1, real_input, on_real), (self.r2, fake_input.detach(), on_fake)):
            if penalty:
                critic = critic + penalty * self._penalty(state, embeddings, verdicts, noise, condition)
        right = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
        return ObjectiveLosses(generator=generator, critic=critic, logs={"accuracy": right.detach()})

    def _features(self, state: DistillState, embeddings: Tensor) -> tuple[Tensor, ...]:
        assert self.taps is not None
        return state.teacher.forward_with_taps(embeddings, state.condition, self.taps).hidden

    def _fake_embeddings(self, state: DistillState, noise: SampleRandom) -> Tensor:
        mask = self._mask(state, noise)
        # A stream of its own: whatever the relaxation, the masks are the same draws.
        shape = state.logits.shape[1:]
        uniform = state.noise("gan_relaxation").uniform(*shape) if self.relaxation.needs_noise else None
        probs = self.relaxation.relax(state.logits, tokens=state.tokens, uniform=uniform, step=state.student_step)
        return state.teacher.embed_soft(probs, mask)

    @torch.no_grad()
    def _real_embeddings(self, state: DistillState, noise: SampleRandom) -> Tensor:
        tokens = state.batch.get("token")
        if tokens is None:
            assert state.tokenizer is not None
            tokens = state.tokenizer.encode(state.batch["image"])
        return state.teacher.embed(tokens.masked_fill(self._mask(state, noise), state.teacher.mask_id))

    def _mask(self, state: DistillState, noise: SampleRandom) -> Tensor:
        """Masks of a share r ~ U[low, high], exact counts that leave a site visible, anew for real and fake."""
        low, high = self.mask_ratio
        sites = state.teacher.num_sites
        counts = ((low + (high - low) * noise.uniform()) * sites).round().long().clamp(max=sites - 1)
        return exact_mask(counts, noise.uniform(sites))

    def _generator_loss(self, on_fake: Tensor) -> Tensor:
        return -on_fake.mean() if self.loss == "hinge" else F.softplus(-on_fake).mean()

    def _critic_loss(self, on_real: Tensor, on_fake: Tensor) -> Tensor:
        if self.loss == "hinge":
            return F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
        return F.softplus(-on_real).mean() + F.softplus(on_fake).mean()

    def _penalty(
        self, state: DistillState, embeddings: Tensor, verdicts: Tensor, noise: SampleRandom, condition: Tensor
    ) -> Tensor:
        shift = self.penalty_noise * noise.normal(*embeddings.shape[1:]).to(embeddings.dtype)
        with torch.no_grad():
            shifted = self._features(state, embeddings + shift)
        difference: Tensor = self.heads(shifted, condition) - verdicts
        return difference.square().mean() / self.penalty_noise**2
