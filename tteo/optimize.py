"""Test-time embedding optimisation: move e_in, and no weight, so that the image scores higher.

Soft-Di[M]O (OpenReview 83pHDDmkXt): e_in -> student -> logits -> softmax(z) E_decoder -> image -> reward, and the
gradient of the reward moves e_in. What is kept is judged on hard-decoded images.

Shape legend: B samples, N sites, K codes, L vectors of width d.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from softgen.categorical import invert_cdf
from softgen.loading import check_compatible
from softgen.models.conditions import Condition
from softgen.models.generator import OneStepGenerator
from softgen.random import SampleRandom, derive_seed
from softgen.relaxation import probabilities, widen
from softgen.tokenizers.base import ImageTokenizer
from tteo.result import TTEOResult, concatenate

Conditions = Tensor | Sequence[str] | Sequence[int]


class Score(Protocol):
    """A reward: differentiable scores (B,) of images (B, 3, H, W) in [0, 1] under B conditions, higher is better."""

    def __call__(self, images: Tensor, conditions: Conditions, /) -> Tensor:
        """The scores."""
        ...


@dataclass(frozen=True)
class TTEOSettings:
    """How the input embedding is moved.

    Attributes:
        steps: Gradient steps, at least 1.
        lr: Step size; the paper uses 0.2 with SGD.
        optimizer: `sgd` or `adam`.
        momentum: Of `sgd`, in [0, 1).
        nesterov: Nesterov's momentum.
        clip: Largest norm of a sample's gradient; 0 does not clip.
        pull: Weight of |e - e_start|^2, which holds the embedding near its start; at least 0.
        noise_norm: Weight of r^2 / 2 - (D - 1) log r, at least 0, with r the norm of what stands in the embedding for
            the generator's D normal draws: it holds r where it is likely, near sqrt(D - 1) (ReNO, arXiv 2406.04312).
        candidates: Starts tried for each condition, in one batch.
        temperature: Of the sampled tokens, above 0.
        relaxation_temperature: Divides the logits that are decoded softly, above 0. A generator whose likeliest codes
            lead by far passes hardly any gradient at 1.
        patience: Stop when no sample has improved for so many steps; 0 never stops early.
        keep_every: Steps between the images of the trajectory; 0 keeps none.
        batch_size: Conditions optimised at a time, which bounds the memory; 0 takes all at once.
    """

    steps: int = 30
    lr: float = 0.2
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    clip: float = 0.0
    pull: float = 0.0
    noise_norm: float = 0.0
    candidates: int = 1
    temperature: float = 1.0
    relaxation_temperature: float = 1.0
    patience: int = 0
    keep_every: int = 0
    batch_size: int = 0

    def check(self) -> None:
        """Refuse impossible settings.

        Raises:
            ValueError: Naming the setting, what was expected and what was got.
        """
        for name, least in (("steps", 1), ("candidates", 1), ("patience", 0), ("keep_every", 0), ("batch_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("lr", "temperature", "relaxation_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("clip", "pull", "noise_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        if self.optimizer not in get_args(Literal["sgd", "adam"]):
            raise ValueError(f"optimizer: expected sgd or adam, got {self.optimizer!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {self.momentum}")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum: expected 0 beside {self.optimizer}, got {self.momentum}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: expected a momentum above 0 beside it, got 0")


def optimize(
    generator: OneStepGenerator,
    tokenizer: ImageTokenizer,
    reward: Score,
    conditions: Conditions,
    *,
    settings: TTEOSettings = TTEOSettings(),
    judge: Score | None = None,
    seed: int = 0,
) -> TTEOResult:
    """Raise a reward by moving the input embeddings of a one-step generator.

    Args:
        generator: Its weights stay as they are.
        tokenizer: Its decoder turns expected code vectors into images; frozen too.
        reward: What is climbed, on softly decoded images.
        conditions: Class labels (n,) int64, or n prompts.
        settings: How the embedding is moved.
        judge: Scores the hard-decoded images that the best is chosen from; by default the reward itself.
        seed: Sample i depends on (seed, i) alone.

    Raises:
        ValueError: If a setting is impossible, the conditions are empty, the models disagree, or a reward returns the
            wrong shape or NaN.
    """
    settings.check()
    if isinstance(conditions, str):
        raise ValueError(f"conditions: expected a list of prompts, got the text {conditions!r}")
    if len(conditions) == 0:
        raise ValueError("conditions: expected at least one label or prompt, got none")
    if not isinstance(conditions, Tensor) and all(isinstance(condition, Integral) for condition in conditions):
        conditions = torch.tensor(conditions)
    check_compatible(generator.model, tokenizer)
    size = settings.batch_size or len(conditions)
    # Gradients are wanted here whatever the caller has switched off.
    with _frozen(generator, tokenizer, reward, judge), torch.inference_mode(False), torch.enable_grad():
        conditions = conditions.clone() if isinstance(conditions, Tensor) else conditions
        parts = []
        for first in range(0, len(conditions), size):
            part = conditions[first : first + size]
            start = first * settings.candidates
            search = _Search(generator, tokenizer, reward, judge or reward, part, settings, seed=seed, first=start)
            parts.append(search.run())
    return concatenate(parts)


def noise_norm_penalty(noise: Tensor) -> Tensor:
    """r^2 / 2 - (D - 1) log r, in float32 or better; least at r = sqrt(D - 1) (ReNO, arXiv 2406.04312).

    But for a constant it is the negative log density of r, the norm of D standard normal draws.

    Args:
        noise: (B, ...), D numbers a sample.

    Returns:
        (B,).
    """
    flat = noise.flatten(1).to(torch.promote_types(noise.dtype, torch.float32))
    square = flat.square().sum(dim=1)
    return square / 2 - (flat.shape[1] - 1) / 2 * square.log()


class _Search:
    """The state of one optimisation: a fixed number of tensors, whatever the number of steps."""

    def __init__(
        self,
        generator: OneStepGenerator,
        tokenizer: ImageTokenizer,
        reward: Score,
        judge: Score,
        conditions: Conditions,
        settings: TTEOSettings,
        *,
        seed: int,
        first: int,
    ) -> None:
        self.generator, self.reward, self.judge = generator, reward, judge
        self.settings = settings
        self.device = tokenizer.codebook.device
        self.conditions = _repeat(conditions, settings.candidates, self.device)
        self.condition: Condition = _encode(generator, self.conditions)
        self.tokenizer = tokenizer.under(self.conditions)
        ordinals = range(first, first + len(self.conditions))
        noise = SampleRandom(derive_seed(seed, "tteo"), ordinals, device=self.device)
        with torch.no_grad():
            self.start = generator.init(noise)
            self.tokens = self._embedded_tokens(seed, ordinals) if settings.noise_norm else None
        # The same uniforms at every step: the hard images differ by the embedding alone.
        self.uniform = noise.uniform(generator.model.num_sites)

    def run(self) -> TTEOResult:
        settings = self.settings
        # In float32 at least, whatever the weights are in: small steps would round to nothing.
        embeddings = widen(self.start).clone().requires_grad_()
        optimizer = self._optimizer(embeddings)
        soft_history, hard_history, kept, kept_steps = [], [], [], []
        start: _Best | None = None
        best: _Best | None = None
        for step in range(settings.steps + 1):
            logits = self.generator.logits(embeddings.to(self.start.dtype), self.condition)
            hard = self._judge_hard(logits.detach(), embeddings.detach(), step)
            start = start or hard
            best = hard if best is None else best.better_of(hard)
            hard_history.append(hard.scores)
            if settings.keep_every and step % settings.keep_every == 0:
                kept.append(hard.images.cpu())
                kept_steps.append(step)
            if step == settings.steps or self._stalled(best, step):
                break
            soft_history.append(self._climb(logits, embeddings, optimizer))
        assert best is not None
        assert start is not None
        return TTEOResult(
            images=best.images,
            tokens=best.tokens,
            embeddings=best.embeddings,
            before=start.scores,
            after=best.scores,
            start_images=start.images,
            start_tokens=start.tokens,
            soft_scores=torch.stack(soft_history) if soft_history else best.scores.new_empty(0, len(best.scores)),
            hard_scores=torch.stack(hard_history),
            best_step=best.step,
            trajectory=torch.stack(kept) if kept else best.images.new_empty(0, *best.images.shape),
            trajectory_steps=tuple(kept_steps),
        )

    def _optimizer(self, embeddings: Tensor) -> torch.optim.Optimizer:
        if self.settings.optimizer == "adam":
            return torch.optim.Adam([embeddings], lr=self.settings.lr)
        settings = self.settings
        return torch.optim.SGD([embeddings], lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)

    def _embedded_tokens(self, seed: int, ordinals: Sequence[int]) -> Tensor:
        """What the initial embeddings (B, L, d) hold besides noise."""
        amount = self.generator.noise
        if amount == 0:
            raise ValueError("noise_norm: expected 0, since this generator adds no noise to its embeddings")
        # The same draws as those of the start.
        draws = SampleRandom(derive_seed(seed, "tteo"), ordinals, device=self.device)
        return math.sqrt(1 - amount**2) * self.generator.model.embed(self.generator.init_tokens(draws))

    def _penalty(self, embeddings: Tensor) -> Tensor | float:
        """What holds the embeddings back, summed over the samples."""
        penalty: Tensor | float = 0.0
        if self.settings.pull:
            penalty = self.settings.pull * (embeddings - self.start).square().sum()
        if self.tokens is not None:
            noise = (embeddings - self.tokens) / self.generator.noise
            penalty = penalty + self.settings.noise_norm * noise_norm_penalty(noise).sum()
        return penalty

    def _climb(self, logits: Tensor, embeddings: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """One gradient step; returns the soft scores that it was taken on."""
        probs = probabilities(logits, temperature=self.settings.relaxation_temperature)
        images = self.tokenizer.decode_embeddings(self.tokenizer.embed_soft(probs))
        scores = _checked(self.reward(images, self.conditions), len(self.conditions), name=_name(self.reward))
        if not scores.requires_grad:
            raise ValueError(
                f"reward {_name(self.reward)}: expected a gradient that reaches the pixels, got scores without a graph"
            )
        (gradient,) = torch.autograd.grad(self._penalty(embeddings) - scores.sum(), embeddings)
        if self.settings.clip:
            norm = gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
            gradient = gradient * (self.settings.clip / norm).clamp(max=1).view(-1, 1, 1)
        embeddings.grad = gradient
        optimizer.step()
        return scores.detach()

    @torch.no_grad()
    def _judge_hard(self, logits: Tensor, embeddings: Tensor, step: int) -> "_Best":
        tokens = invert_cdf(probabilities(logits, temperature=self.settings.temperature), self.uniform)
        images = self.tokenizer.decode(tokens)
        scores = _checked(self.judge(images, self.conditions), len(self.conditions), name=_name(self.judge)).float()
        steps = torch.full_like(scores, step, dtype=torch.long)
        return _Best(images=images, tokens=tokens, embeddings=embeddings.clone(), scores=scores, step=steps)

    def _stalled(self, best: "_Best", step: int) -> bool:
        patience = self.settings.patience
        return bool(patience) and step >= patience and step - int(best.step.max()) >= patience


@dataclass(frozen=True)
class _Best:
    images: Tensor
    tokens: Tensor
    embeddings: Tensor
    scores: Tensor
    step: Tensor

    def better_of(self, other: "_Best") -> "_Best":
        """Sample by sample, whichever scores higher."""
        wins = other.scores > self.scores
        return _Best(
            images=torch.where(wins.view(-1, 1, 1, 1), other.images, self.images),
            tokens=torch.where(wins.view(-1, 1), other.tokens, self.tokens),
            embeddings=torch.where(wins.view(-1, 1, 1), other.embeddings, self.embeddings),
            scores=torch.where(wins, other.scores, self.scores),
            step=torch.where(wins, other.step, self.step),
        )


def _repeat(conditions: Conditions, times: int, device: torch.device) -> Tensor | list[str]:
    if isinstance(conditions, Tensor):
        return conditions.to(device).repeat_interleave(times)
    return [str(prompt) for prompt in conditions for _ in range(times)]


def _encode(generator: OneStepGenerator, conditions: Conditions) -> Condition:
    classes = generator.model.num_classes
    if classes and isinstance(conditions, Tensor) and not bool(((conditions >= 0) & (conditions < classes)).all()):
        raise ValueError(f"conditions: expected labels in 0..{classes - 1}, got {conditions.tolist()}")
    asked = conditions if isinstance(conditions, Tensor) else [str(prompt) for prompt in conditions]
    return generator.model.encode(asked)


def _checked(scores: Tensor, count: int, *, name: str) -> Tensor:
    if scores.shape != (count,):
        raise ValueError(f"reward {name}: expected scores of shape ({count},), got {tuple(scores.shape)}")
    if not bool(scores.isfinite().all()):
        wrong = int((~scores.isfinite()).sum())
        raise ValueError(f"reward {name}: expected finite scores, got NaN or infinity in {wrong} of {count}")
    return scores


def _name(reward: Score) -> str:
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__)


@contextmanager
def _frozen(*modules: object) -> Iterator[None]:
    """Within, no weight asks for a gradient and every module is in eval mode; afterwards all is as it was."""
    seen = [module for module in modules if isinstance(module, nn.Module)]
    parameters = [parameter for module in seen for parameter in module.parameters()]
    asked = [parameter.requires_grad for parameter in parameters]
    training = [(part, part.training) for module in seen for part in module.modules()]
    try:
        for parameter in parameters:
            parameter.requires_grad = False
        for module in seen:
            module.eval()
        yield
    finally:
        for parameter, wanted in zip(parameters, asked, strict=True):
            parameter.requires_grad = wanted
        for part, mode in training:
            part.training = mode
