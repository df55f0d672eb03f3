"""TTEO on toys: the reward rises on hard-decoded images, no weight moves, and it is deterministic."""

import gc
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor, nn

from softgen.models import MaskedTransformer, OneStepGenerator
from softgen.testing import ToyTokenizer
from tteo import TTEOSettings, optimize


def _ink(images: Tensor, conditions: object) -> Tensor:
    return images.mean(dim=(1, 2, 3))


@pytest.fixture
def generator() -> OneStepGenerator:
    torch.manual_seed(0)
    model = MaskedTransformer(num_codes=5, num_sites=4, num_classes=3, width=16, depth=2, heads=2)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return OneStepGenerator(model)


@pytest.fixture
def tokenizer() -> ToyTokenizer:
    return ToyTokenizer(num_codes=5)


LABELS = torch.arange(12) % 3


@pytest.mark.parametrize(("name", "lr"), [("sgd", 30.0), ("adam", 0.05)])
def test_the_reward_of_hard_images_rises(
    generator: OneStepGenerator, tokenizer: ToyTokenizer, name: str, lr: float
) -> None:
    settings = TTEOSettings(steps=25, lr=lr, optimizer=name)  # type: ignore[arg-type]
    before = {key: value.clone() for key, value in generator.state_dict().items()}

    result = optimize(generator, tokenizer, _ink, LABELS, settings=settings)

    assert (result.after >= result.before).all()
    assert result.after.mean() > result.before.mean() + 0.2
    assert result.soft_scores[-1].mean() > result.soft_scores[0].mean() + 0.1
    torch.testing.assert_close(_ink(tokenizer.decode(result.tokens), None), result.after)
    torch.testing.assert_close(result.images, tokenizer.decode(result.tokens))
    assert all(torch.equal(value, before[key]) for key, value in generator.state_dict().items())
    assert all(parameter.requires_grad for parameter in generator.parameters())
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert result.soft_scores.shape == (25, 12)
    assert result.hard_scores.shape == (26, 12)


def test_the_first_step_is_the_gradient_of_the_soft_reward(
    generator: OneStepGenerator, tokenizer: ToyTokenizer
) -> None:
    result = optimize(generator, tokenizer, _ink, LABELS[:2], settings=TTEOSettings(steps=1, lr=7.0, keep_every=1))
    start = optimize(generator, tokenizer, lambda images, _: 0 * _ink(images, _), LABELS[:2]).embeddings
    moving = start.clone().requires_grad_()
    logits = generator.logits(moving, generator.model.encode(LABELS[:2]))
    soft = tokenizer.decode_embeddings(tokenizer.embed_soft(logits.softmax(-1)))
    (gradient,) = torch.autograd.grad(_ink(soft, None).sum(), moving)
    moved = (result.best_step == 1).view(-1, 1, 1)
    assert moved.any()
    torch.testing.assert_close(result.embeddings, torch.where(moved, start + 7.0 * gradient, start))
    assert result.trajectory.shape == (2, 2, 3, 8, 8)
    assert result.trajectory_steps == (0, 1)


def test_deterministic_by_seed_and_candidates_share_a_batch(
    generator: OneStepGenerator, tokenizer: ToyTokenizer
) -> None:
    settings = TTEOSettings(steps=3, lr=5.0, candidates=2)
    first = optimize(generator, tokenizer, _ink, LABELS, settings=settings, seed=4)
    again = optimize(generator, tokenizer, _ink, LABELS, settings=settings, seed=4)
    other = optimize(generator, tokenizer, _ink, LABELS, settings=settings, seed=5)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.embeddings, other.embeddings)
    assert first.images.shape[0] == 24
    both = first.embeddings.unflatten(0, (12, 2))
    assert (both[:, 0] - both[:, 1]).flatten(1).norm(dim=1).min() > 0.1


def _last_is_best() -> Callable[[Tensor, object], Tensor]:
    """A judge that likes every image better than those before."""
    calls = count()
    return lambda images, conditions: torch.full((len(images),), float(next(calls)))


def test_the_pull_is_towards_the_start(generator: OneStepGenerator, tokenizer: ToyTokenizer) -> None:
    moved = [
        optimize(
            generator, tokenizer, _ink, LABELS, settings=TTEOSettings(steps=steps, lr=30.0, pull=0.004), judge=judge
        ).embeddings
        for steps, judge in ((1, _last_is_best()), (2, _last_is_best()))
    ]
    start = optimize(generator, tokenizer, lambda images, _: 0 * _ink(images, _), LABELS).embeddings
    at = moved[0].clone().requires_grad_()
    logits = generator.logits(at, generator.model.encode(LABELS))
    soft = tokenizer.decode_embeddings(tokenizer.embed_soft(logits.softmax(-1)))
    (gradient,) = torch.autograd.grad(_ink(soft, None).sum(), at)
    pulled = 2 * 0.004 * (moved[0] - start)
    assert pulled.norm() > 0.1 * gradient.norm()
    torch.testing.assert_close(moved[1], moved[0] + 30.0 * (gradient - pulled))


def test_small_steps_of_a_generator_in_half_precision_are_kept(
    generator: OneStepGenerator, tokenizer: ToyTokenizer
) -> None:
    settings = TTEOSettings(steps=4, lr=1e-4)
    halved = optimize(generator.bfloat16(), tokenizer, _ink, LABELS, settings=settings, judge=_last_is_best())
    assert halved.embeddings.dtype == torch.float32
    start = optimize(generator, tokenizer, _ink, LABELS, settings=replace(settings, lr=1e-30), judge=_last_is_best())
    assert (halved.embeddings != start.embeddings).any(dim=-1).all()


def test_every_part_of_a_score_is_left_in_its_mode(generator: OneStepGenerator, tokenizer: ToyTokenizer) -> None:
    class Judge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Dropout(0.9).eval()

        def forward(self, images: Tensor, conditions: object) -> Tensor:
            return self.inner(images).mean(dim=(1, 2, 3))

    judge = Judge()
    generator.model.eval()
    optimize(generator, tokenizer, judge, LABELS, settings=TTEOSettings(steps=1))
    assert judge.training
    assert not judge.inner.training
    assert generator.training
    assert not any(module.training for module in generator.model.modules())


def test_clip_and_patience(generator: OneStepGenerator, tokenizer: ToyTokenizer) -> None:
    free = optimize(generator, tokenizer, _ink, LABELS, settings=TTEOSettings(steps=5, lr=30.0))
    clipped = optimize(generator, tokenizer, _ink, LABELS, settings=TTEOSettings(steps=5, lr=30.0, clip=1e-4))
    assert clipped.soft_scores[-1].mean() < free.soft_scores[-1].mean()
    stopped = optimize(
        generator, tokenizer, lambda images, _: 0 * _ink(images, _), LABELS, settings=TTEOSettings(steps=50, patience=4)
    )
    assert stopped.hard_scores.shape[0] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps: expected at least 1, got 0"),
        ({"lr": 0.0}, r"lr: expected a number above 0, got 0\.0"),
        ({"clip": -1.0}, r"clip: expected a number of at least 0, got -1\.0"),
        ({"optimizer": "lbfgs"}, r"optimizer: expected sgd or adam, got 'lbfgs'"),
    ],
)
def test_impossible_settings(
    generator: OneStepGenerator, tokenizer: ToyTokenizer, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        optimize(generator, tokenizer, _ink, LABELS, settings=TTEOSettings(**options))  # type: ignore[arg-type]


def test_bad_conditions_and_rewards(generator: OneStepGenerator, tokenizer: ToyTokenizer) -> None:
    with pytest.raises(ValueError, match="conditions: expected at least one label or prompt, got none"):
        optimize(generator, tokenizer, _ink, LABELS[:0])
    with pytest.raises(ValueError, match=r"^conditions: expected a list of prompts, got the text 'a red circle'$"):
        optimize(generator, tokenizer, _ink, "a red circle")
    with pytest.raises(ValueError, match=r"conditions: expected labels in 0\.\.2, got \[5\]"):
        optimize(generator, tokenizer, _ink, torch.tensor([5]))
    with pytest.raises(ValueError, match="since this model is class-conditional, got prompts"):
        optimize(generator, tokenizer, _ink, ["a cat"])
    with pytest.raises(ValueError, match=r"reward <lambda>: expected scores of shape \(12,\), got \(12, 3\)"):
        optimize(generator, tokenizer, lambda images, _: images.mean(dim=(2, 3)), LABELS)
    with pytest.raises(ValueError, match="reward <lambda>: expected finite scores"):
        optimize(generator, tokenizer, lambda images, _: _ink(images, _) / 0 - _ink(images, _) / 0, LABELS)


def test_batches_change_nothing(generator: OneStepGenerator, tokenizer: ToyTokenizer) -> None:
    settings = TTEOSettings(steps=6, lr=30.0, keep_every=2, candidates=2)
    whole = optimize(generator, tokenizer, _ink, LABELS, settings=settings)
    parts = optimize(generator, tokenizer, _ink, LABELS, settings=replace(settings, batch_size=5))
    for name in ("tokens", "start_tokens", "best_step"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    for name in ("images", "embeddings", "before", "after", "soft_scores", "hard_scores", "trajectory"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))
    assert parts.trajectory_steps == whole.trajectory_steps == (0, 2, 4, 6)


def test_a_batch_that_stops_early_keeps_its_last_scores(generator: OneStepGenerator, tokenizer: ToyTokenizer) -> None:
    def dark_first(images: Tensor, conditions: Tensor) -> Tensor:
        return _ink(images, None) * (conditions == 0)

    settings = TTEOSettings(steps=12, lr=30.0, patience=2, batch_size=2, keep_every=1)
    result = optimize(generator, tokenizer, dark_first, torch.tensor([1, 1, 0, 0]), settings=settings)
    assert (result.best_step[:2] == 0).all()
    assert len(result.hard_scores) > 3
    assert (result.hard_scores[:, :2] == 0).all()
    assert result.after[2:].sum() > result.before[2:].sum()
    assert len(result.trajectory) == len(result.trajectory_steps) == len(result.hard_scores)


def test_memory_does_not_grow_with_the_steps(generator: OneStepGenerator, tokenizer: ToyTokenizer) -> None:
    held: list[int] = []

    def counting(images: Tensor, conditions: object) -> Tensor:
        if images.requires_grad:
            gc.collect()
            storages = {
                tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
                for tensor in gc.get_objects()
                if type(tensor) is Tensor and not torch._is_functional_tensor(tensor)
            }
            held.append(sum(storages.values()))
        return _ink(images, conditions)

    optimize(generator, tokenizer, counting, LABELS, settings=TTEOSettings(steps=12, lr=1.0), judge=_ink)
    scores_a_step = 2 * len(LABELS) * 4
    assert max(held[-1] - held[3], 0) <= (len(held) - 4) * scores_a_step
    assert len(held) == 12


def test_a_reward_without_a_gradient_is_named(generator: OneStepGenerator, tokenizer: ToyTokenizer) -> None:
    def detached(images: Tensor, conditions: object) -> Tensor:
        return images.detach().mean(dim=(1, 2, 3))

    with pytest.raises(ValueError, match="reward detached: expected a gradient that reaches the pixels"):
        optimize(generator, tokenizer, detached, LABELS, settings=TTEOSettings(steps=1, pull=1.0))


def test_labels_may_be_integers_and_the_caller_may_have_switched_gradients_off(
    generator: OneStepGenerator, tokenizer: ToyTokenizer
) -> None:
    with torch.inference_mode():
        inferred = optimize(generator, tokenizer, _ink, LABELS.clone(), settings=TTEOSettings(steps=2, lr=3.0))
    with torch.no_grad():
        listed = optimize(generator, tokenizer, _ink, LABELS.tolist(), settings=TTEOSettings(steps=2, lr=3.0))
    given = optimize(generator, tokenizer, _ink, LABELS, settings=TTEOSettings(steps=2, lr=3.0))
    arrayed = optimize(generator, tokenizer, _ink, LABELS.numpy(), settings=TTEOSettings(steps=2, lr=3.0))  # type: ignore[arg-type]
    assert torch.equal(inferred.embeddings, given.embeddings)
    assert torch.equal(listed.embeddings, given.embeddings)
    assert torch.equal(arrayed.embeddings, given.embeddings)
