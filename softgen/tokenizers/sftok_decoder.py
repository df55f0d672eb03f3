"""SFTok's decoder (arXiv 2512.16910): proxy codes in several steps, and what it is trained on.

Shape legend: B batch, L latent tokens, D code dimension, P proxies, V proxy codes, W width.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.categorical import UniformSource
from softgen.masking import mask_least_confident
from softgen.relaxation import expected_embedding, gumbel_noise, widen
from softgen.tokenizers.titok import ViTBlock, free_parameter

MaskSchedule = Literal["arccos", "linear", "quadratic", "cubic", "exponential", "cosine"]

_SCHEDULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "arccos": lambda t, power: (t.acos() * (2 / math.pi)) ** power,
    "linear": lambda t, power: 1 - t,
    "quadratic": lambda t, power: (1 - t) ** power,
    "cubic": lambda t, power: (1 - t) ** 3,
    "exponential": lambda t, power: (-power * t).exp(),
    "cosine": lambda t, power: (1 + (math.pi * t).cos()) / 2,
}


@dataclass(frozen=True)
class Refined:
    """What a step of the decoder predicts.

    Attributes:
        tokens: Proxy codes (B, P), int64.
        logits: At all proxies, (B, P, V), float32; those of the last step are differentiable in the latents.
    """

    tokens: Tensor
    logits: Tensor


class SFTokDecoder(nn.Module):
    """Proxies, known or masked, and the latents through a ViT; logits over proxy codes come out.

    Args:
        image_size: Pixels a side.
        patch_size: Pixels a side of a patch, each of which has a proxy.
        width: W.
        depth: Number of blocks.
        heads: Attention heads; divides W.
        latent_tokens: L.
        token_size: D.
        proxy_codes: V.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        latent_tokens: int,
        token_size: int,
        proxy_codes: int,
    ) -> None:
        super().__init__()
        self.grid = image_size // patch_size
        self.num_proxies, self.num_codes, self.mask_id = self.grid**2, proxy_codes, proxy_codes
        self.decoder_embed = nn.Linear(token_size, width)
        self.condition_positional_embedding = free_parameter(latent_tokens, width, width=width)
        self.class_embedding = free_parameter(1, width, width=width)
        self.learnable_embedding = nn.Embedding(proxy_codes + 1, width)
        self.learnable_embedding_positional_embedding = free_parameter(self.num_proxies + 1, width, width=width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(ViTBlock(width, heads=heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, proxy_codes, 1))

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, P, W) of proxy codes (B, P), V where masked."""
        embedded: Tensor = self.learnable_embedding(tokens)
        return embedded

    def embed_soft(self, probs: Tensor, masked: Tensor | None = None) -> Tensor:
        """Expected embeddings (B, P, W) under probs (B, P, V); the mask's where `masked` (B, P)."""
        table = self.learnable_embedding.weight
        soft = expected_embedding(probs, table[: self.num_codes])
        return soft if masked is None else torch.where(masked.unsqueeze(-1), table[self.mask_id], soft)

    def forward(self, proxies: Tensor, z: Tensor) -> Tensor:
        """Logits (B, P, V) from embedded proxies (B, P, W) and latents (B, L, D)."""
        batch = z.shape[0]
        x = torch.cat([self.class_embedding.expand(batch, 1, -1).to(proxies.dtype), proxies], dim=1)
        x = x + self.learnable_embedding_positional_embedding
        latents = self.decoder_embed(z.to(self.decoder_embed.weight.dtype)) + self.condition_positional_embedding
        x = self.ln_pre(torch.cat([x.to(latents.dtype), latents], dim=1))
        for block in self.transformer:
            x = block(x)
        x = self.ln_post(x[:, 1 : 1 + self.num_proxies])
        logits: Tensor = self.ffn(x.transpose(1, 2).unsqueeze(-1))
        return logits.squeeze(-1).transpose(1, 2)

    def proxy_logits(self, tokens: Tensor, z: Tensor) -> Tensor:
        """One step: logits (B, P, V), float32, from proxy codes (B, P), V where masked, and latents (B, L, D)."""
        return widen(self(self.embed(tokens), z))

    def refine(
        self, z: Tensor, noise: UniformSource, *, steps: int, temperature: float, anneal: bool = False
    ) -> Refined:
        """Predict the proxies of latents (B, L, D) in several steps.

        Only the last step is differentiated: proxies chosen before it are inputs. Noise a step: (P, V) for the proxies,
        then P for the confidence; the last step and a temperature of 0 need none and draw it all the same.

        Args:
            z: Latents (B, L, D).
            noise: Uniform draws.
            steps: In 1..P.
            temperature: T, at least 0: Gumbel noise is scaled by T (1 - r), r the share of steps done.
            anneal: Divide the logits by 0.5 + 0.8 (1 - r).

        Raises:
            ValueError: If steps or temperature are out of range.
        """
        return deque(self.predictions(z, noise, steps=steps, temperature=temperature, anneal=anneal), maxlen=1).pop()

    def predictions(
        self, z: Tensor, noise: UniformSource, *, steps: int, temperature: float, anneal: bool = False
    ) -> Iterator[Refined]:
        """What each step of `refine` predicts, of all proxies; arguments and errors as there.

        Proxies that an earlier step has settled are tokens as they were settled; the logits are those of the step.
        """
        self.check_steps(steps, temperature)
        return self._predictions(z, noise, steps, temperature, anneal=anneal)

    def _predictions(
        self, z: Tensor, noise: UniformSource, steps: int, temperature: float, *, anneal: bool
    ) -> Iterator[Refined]:
        tokens = torch.full((len(z), self.num_proxies), self.mask_id, device=z.device)
        for step in range(steps - 1):
            with torch.no_grad():
                progress = (step + 1) / steps
                logits = self.proxy_logits(tokens, z)
                if anneal:
                    logits = logits / (0.5 + 0.8 * (1 - progress))
                drawn, confidence = _draw(logits, tokens, noise, temperature * (1 - progress))
                kept = math.floor(self.num_proxies * math.acos(progress) / (math.pi / 2))
                masked = tokens == self.mask_id
                tokens = mask_least_confident(drawn, confidence, masked, kept=kept, mask_id=self.mask_id)
            yield Refined(tokens=drawn, logits=logits)
        logits = self.proxy_logits(tokens, z)
        if anneal:
            logits = logits / 0.5
        yield Refined(tokens=_draw(logits.detach(), tokens, noise, 0.0)[0], logits=logits)

    def check_steps(self, steps: int, temperature: float, *, key: str = "") -> None:
        """Refuse what `refine` cannot do.

        Raises:
            ValueError: Naming the argument, what was expected and what was got.
        """
        if not 1 <= steps <= self.num_proxies:
            raise ValueError(f"{key}steps: expected 1 to {self.num_proxies}, the number of proxies, got {steps}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"{key}temperature: expected a finite number of at least 0, got {temperature}")


def _draw(logits: Tensor, tokens: Tensor, noise: UniformSource, temperature: float) -> tuple[Tensor, Tensor]:
    """Proxy codes (B, P), those known kept, and their confidence, which is a logit and not a probability."""
    masked = tokens == logits.shape[-1]
    drawn = (logits + temperature * gumbel_noise(noise.uniform(*logits.shape[1:]))).argmax(dim=-1)
    score = logits.gather(-1, drawn.unsqueeze(-1)).squeeze(-1).masked_fill(~masked, math.inf)
    confidence = score + temperature * gumbel_noise(noise.uniform(logits.shape[1]))
    return torch.where(masked, drawn, tokens), confidence


@dataclass(frozen=True)
class SelfForced:
    """What the decoder is given in training.

    Attributes:
        tokens: Proxy codes (B, P), V where masked.
        masked: Which are, (B, P) bool.
    """

    tokens: Tensor
    masked: Tensor


def self_forced_input(
    guided: Tensor,
    noise: UniformSource,
    *,
    mask_id: int,
    truth: Tensor | None = None,
    replace_prob: float = 1.0,
    schedule: MaskSchedule = "arccos",
    power: float = 1.0,
    min_ratio: float = 0.0,
    max_ratio: float = 1.0,
) -> SelfForced:
    """Self-forcing guided visual reconstruction: visible proxies are the model's own first prediction.

    Noise: one draw an image for the share of masks, P for their places, and with `truth` P for the replacement. No
    proxy at all may be masked.

    Args:
        guided: The likeliest proxies of a pass with all of them masked, (B, P).
        noise: Uniform draws.
        mask_id: V.
        truth: The teacher's proxies, (B, P), of which each is replaced by the guided one with `replace_prob`; None
            takes all guided, as fine-tuning does.
        replace_prob: In [0, 1]. 1 in the paper; 0 is the vanilla strategy, which shows true proxies.
        schedule: The share of masks from t in [0, 1): acos(t) 2/pi to the `power`; linear 1 - t; quadratic
            (1 - t)^power; cubic (1 - t)^3; exponential exp(-power t); cosine (1 + cos(pi t)) / 2.
        power: Of the schedule, at least 0.
        min_ratio: The share where the schedule is at 0; no fewer proxies are masked, rounded down.
        max_ratio: The share where it is at 1; no more are masked, rounded down.

    Raises:
        ValueError: If the schedule is unknown or a number out of range.
    """
    check_self_forcing(
        replace_prob=replace_prob, schedule=schedule, power=power, min_ratio=min_ratio, max_ratio=max_ratio
    )
    proxies = guided.shape[1]
    ratio = min_ratio + (max_ratio - min_ratio) * _SCHEDULES[schedule](noise.uniform(), power)
    counts = (proxies * ratio).round().long().clamp(int(proxies * min_ratio), int(proxies * max_ratio))
    # The published masks: the permutation itself is compared, where `exact_mask` takes its inverse.
    masked = noise.uniform(proxies).argsort(dim=-1) < counts.unsqueeze(-1)
    shown = guided if truth is None else torch.where(noise.uniform(proxies) < replace_prob, guided, truth)
    return SelfForced(tokens=shown.masked_fill(masked, mask_id), masked=masked)


def check_self_forcing(
    *, replace_prob: float, schedule: str, power: float, min_ratio: float, max_ratio: float, key: str = ""
) -> None:
    """Refuse settings of `self_forced_input` that are out of range.

    Raises:
        ValueError: Naming the argument, what was expected and what was got.
    """
    if not 0 <= replace_prob <= 1:
        raise ValueError(f"{key}replace_prob: expected a number in [0, 1], got {replace_prob}")
    if schedule not in _SCHEDULES:
        raise ValueError(f"{key}schedule: expected one of {', '.join(get_args(MaskSchedule))}, got {schedule!r}")
    if not 0 <= power < math.inf:
        raise ValueError(f"{key}power: expected a finite number of at least 0, got {power}")
    if not 0 <= min_ratio <= max_ratio <= 1:
        raise ValueError(f"{key}min_ratio: expected 0 <= min_ratio <= max_ratio <= 1, got {min_ratio} and {max_ratio}")


def proxy_loss(logits: Tensor, target: Tensor, masked: Tensor | None = None, *, visible_weight: float = 0.1) -> Tensor:
    """Cross-entropy of proxies; a weighted mean over all of the batch.

    Args:
        logits: (B, P, V).
        target: The teacher's proxies (B, P), at visible places too.
        masked: Which proxies were masked, (B, P); None weighs all of them 1, as warm-up does.
        visible_weight: Of those that were not masked.
    """
    losses = F.cross_entropy(widen(logits).transpose(1, 2), target, reduction="none")
    if masked is None:
        return losses.mean()
    weights = torch.full_like(losses, visible_weight).masked_fill(masked, 1.0)
    return (losses * weights).sum() / (weights.sum() + 1e-8)
