"""Reward fine-tuning through the decoder (Soft-Di[M]O, OpenReview 83pHDDmkXt).

logits -> softmax(z) E_decoder -> decoder -> image -> rewards: the expected code vector stands in for the sampled
codes, so that the gradient of the rewards reaches the student.

Shape legend: B batch, N sites, K codes, D width of a code vector, M images a micro-batch.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.objectives.base import DistillState, Objective, ObjectiveLosses, with_value_and_gradient
from rewards.base import Reward as RewardModel
from rewards.composite import CompositeReward, Normalisation
from rewards.probe import probe_reward
from rewards.registry import build
from softgen.metrics.hacking import colour_entropy, diversity, saturation
from softgen.models.base import MaskedDiffusionModel
from softgen.models.conditions import Asked, split_asked
from softgen.relaxation import Relaxation, full_precision
from softgen.tokenizers.base import ImageTokenizer


class Reward(Objective):
    """L_reward = -mean over the batch of sum_i w_i R_i(decode(softmax(z) E_decoder), condition).

    Beside each reward, as `score_<name>`, it logs the signs of reward hacking: saturation and entropy of the colours,
    and the mean distance between decoder embeddings, of one class where there are classes (diversity). Now and then it
    scores the decoding of the sampled codes too, as `hard_score_<name>`: a gap to `score_<name>` means that the student
    climbs the softness.

    Args:
        rewards: What is climbed: reward models, or names that `python -m rewards list` shows, for those that need no
            arguments. They stay frozen.
        weights: w_i, one for each of `rewards`; by default 1 each.
        normalisation: By name, for the rewards whose scores enter the sum as (score - mean) / std.
        held_out: Rewards that are logged as `held_out_<name>`, on the sampled codes, and never climbed.
        held_out_every: Steps between looks at the sampled codes, at least 1.
        relaxation: How the student's logits become embeddings.
        micro_batch: Images decoded and scored at a time, which bounds the memory; 0 takes the whole batch.
        checkpoint_decoder: Recompute the decoder in the backward pass instead of keeping its activations.
        weight: w_reward, or `auto`: the gradient at the logits is held at `weight_ratio` times that of the first
            objective.
        weight_ratio: For `auto`, above 0.

    Raises:
        ValueError: A setting is out of range, a name is unknown or taken twice; at setup: a reward whose gradient does
            not reach the pixels, or whose scores have the wrong shape or are not finite.
    """

    name = "reward"
    relaxation: Relaxation
    needs_tokenizer = True

    def __init__(
        self,
        *,
        rewards: Sequence[RewardModel | str],
        weights: Sequence[float] | None = None,
        normalisation: Mapping[str, Normalisation] | None = None,
        held_out: Sequence[RewardModel | str] = (),
        held_out_every: int = 10,
        relaxation: Relaxation = Relaxation(),  # noqa: B008 - frozen
        micro_batch: int = 0,
        checkpoint_decoder: bool = False,
        weight: float | Literal["auto"] = 1.0,
        weight_ratio: float = 1.0,
    ) -> None:
        super().__init__(weight=weight, weight_ratio=weight_ratio)
        if micro_batch < 0:
            raise ValueError(f"Reward.micro_batch: expected at least 0, got {micro_batch}")
        if held_out_every < 1:
            raise ValueError(f"Reward.held_out_every: expected at least 1, got {held_out_every}")
        relaxation.check(key="Reward.relaxation")
        climbed, watched = _open(rewards), _open(held_out)
        names = [reward.name for reward in (*climbed, *watched)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"Reward.rewards: expected names that are unique, got {name!r} twice")
        # A plain dict: registered nowhere, so that the rewards stay out of checkpoints.
        self._frozen: dict[str, nn.Module] = {
            "rewards": CompositeReward(climbed, weights=weights, normalisation=normalisation),
            **{f"held_out_{reward.name}": reward for reward in watched},
        }
        self.held_out_every = held_out_every
        self.relaxation = relaxation
        self.micro_batch = micro_batch
        self.checkpoint_decoder = checkpoint_decoder

    @property
    def rewards(self) -> CompositeReward:
        """What is climbed."""
        composite = self._frozen["rewards"]
        assert isinstance(composite, CompositeReward)
        return composite

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """The reward models."""
        return self._frozen

    def setup(self, teacher: MaskedDiffusionModel, tokenizer: ImageTokenizer | None) -> None:
        """Probe every reward before anything is trained; those that are climbed with a gradient."""
        assert tokenizer is not None
        asked: Asked = torch.tensor([0, max(0, teacher.num_classes - 1)])
        if teacher.text_encoder is not None:
            asked = ["a picture", "another picture"]
        for name, reward in self._frozen.items():
            assert isinstance(reward, RewardModel)
            probe_reward(reward, image_size=tokenizer.image_size, conditions=asked, gradient=name == "rewards")

    def forward(self, state: DistillState) -> ObjectiveLosses:
        """Decode, score, and take the gradient at the decoder embeddings, one micro-batch after the other."""
        assert state.tokenizer is not None
        embeddings = state.tokenizer.embed_soft(self._probabilities(state))
        size = self.micro_batch or len(embeddings)
        images, scores, gradients = [], [], []
        for part, asked in zip(torch.split(embeddings.detach(), size), split_asked(state.asked, size), strict=True):
            with torch.enable_grad():
                leaf = part.requires_grad_()
                decoded = self._decode(state.tokenizer.under(asked), leaf)
                by_name = self.rewards.scores(decoded, asked)
                loss = -self.rewards.combine(by_name).sum() / len(embeddings)
            with full_precision(leaf):  # as in any backward pass, which autocast does not reach
                gradients.append(torch.autograd.grad(loss, leaf)[0])
            images.append(decoded.detach())
            scores.append({name: score.detach() for name, score in by_name.items()})
        means = {name: torch.cat([part[name] for part in scores]) for name in self.rewards.names}
        value = -self.rewards.combine(means).mean()
        logs = {f"score_{name}": score.float().mean() for name, score in means.items()}
        logs.update(self._watch(torch.cat(images), embeddings.detach(), state.asked))
        # Counted as Lightning counts the steps that it logs.
        if (state.step + 1) % self.held_out_every == 0:
            logs.update(self._look_at_samples(state))
        return ObjectiveLosses(generator=with_value_and_gradient(embeddings, torch.cat(gradients), value), logs=logs)

    def _probabilities(self, state: DistillState) -> Tensor:
        uniform = None
        if self.relaxation.needs_noise:
            uniform = state.noise("reward_relaxation").uniform(*state.logits.shape[1:])
        return self.relaxation.relax(state.logits, tokens=state.tokens, uniform=uniform, step=state.student_step)

    def _decode(self, tokenizer: ImageTokenizer, embeddings: Tensor) -> Tensor:
        if self.checkpoint_decoder:
            decoded: Tensor = checkpoint(tokenizer.decode_embeddings, embeddings, use_reentrant=False)
            return decoded
        return tokenizer.decode_embeddings(embeddings)

    @torch.no_grad()
    def _watch(self, images: Tensor, embeddings: Tensor, asked: Asked) -> dict[str, Tensor]:
        return {
            "saturation": saturation(images),
            "colour_entropy": colour_entropy(images),
            "diversity": diversity(embeddings, asked if isinstance(asked, Tensor) else None),
        }

    @torch.no_grad()
    def _look_at_samples(self, state: DistillState) -> dict[str, Tensor]:
        """Every reward on the decoding of the sampled codes."""
        assert state.tokenizer is not None
        size = self.micro_batch or len(state.tokens)
        parts: dict[str, list[Tensor]] = {}
        for tokens, asked in zip(torch.split(state.tokens, size), split_asked(state.asked, size), strict=True):
            images = state.tokenizer.under(asked).decode(tokens)
            for name, scores in self.rewards.scores(images, asked).items():
                parts.setdefault(f"hard_score_{name}", []).append(scores)
            for name, reward in self._frozen.items():
                if name != "rewards":
                    parts.setdefault(name, []).append(reward(images, asked))
        return {name: torch.cat(scores).float().mean() for name, scores in parts.items()}


def _open(rewards: Sequence[RewardModel | str]) -> list[RewardModel]:
    return [build(reward) if isinstance(reward, str) else reward for reward in rewards]
