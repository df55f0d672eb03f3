"""Reward fine-tuning through the decoder: the value, the gradient, what stays frozen, and what is refused."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from distill import GAN, DiMO, Reward, SoftDiMO
from distill.objectives import DistillState
from distill.weighting import weigh
from rewards import ClassifierReward, Normalisation
from rewards import Reward as RewardModel
from softgen.callbacks import StopOnNonFinite
from softgen.data import Digits, Labels, TokenCache, write_token_cache
from softgen.metrics.hacking import colour_entropy, diversity, saturation
from softgen.models import MaskedDiffusionModel, MaskedTransformer
from softgen.random import SampleRandom, derive_seed
from softgen.relaxation import Relaxation, full_precision, gumbel_noise, probabilities
from softgen.testing import ToyMaskedModel, ToyTokenizer, count_calls
from softgen.tokenizers import ConvVQTokenizer, ImageTokenizer
from softgen.training import OptimizerConfig

BATCH = 6
LABELS = torch.arange(BATCH) % 3
STREAM = derive_seed(0, "reward_relaxation")


class Pattern(RewardModel):
    """tanh of the images' product with a pattern a class: smooth, and no two pixels alike."""

    takes = "labels"

    def __init__(self, *, name: str = "pattern", seed: int = 0, image_size: int = 8) -> None:
        super().__init__(name=name)
        generator = torch.Generator().manual_seed(seed)
        self.patterns = nn.Parameter(torch.randn(3, 3 * image_size**2, generator=generator))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return (0.1 * (images.flatten(1) * self.patterns[labels]).sum(dim=1)).tanh()


class Brightness(RewardModel):
    """The mean of the pixels, linear in the images."""

    takes = "any"

    def forward(self, images: Tensor, conditions: object) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class Redness(Brightness):
    """The mean of the first channel."""

    def forward(self, images: Tensor, conditions: object) -> Tensor:
        return images[:, 0].mean(dim=(1, 2))


class Scripted(RewardModel):
    """Returns what a function makes of the images."""

    takes = "any"

    def __init__(self, function: Callable[[Tensor], Tensor], *, name: str = "scripted") -> None:
        super().__init__(name=name)
        self.function = function

    def forward(self, images: Tensor, conditions: object) -> Tensor:
        return self.function(images)


def _classifier() -> ClassifierReward:
    torch.manual_seed(4)
    return ClassifierReward(nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 3)))


@pytest.fixture
def tokenizer() -> ConvVQTokenizer:
    model = ConvVQTokenizer(image_size=8, num_codes=7, channels=[8, 8])
    last = model.decoder[-1]
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    nn.init.constant_(last.bias, 0.5)  # a decoder whose pixels are not clamped
    return model


@pytest.fixture
def teacher() -> MaskedTransformer:
    model = MaskedTransformer(num_codes=7, num_sites=16, num_classes=3, width=8, depth=2, heads=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def _module(teacher: MaskedDiffusionModel, tokenizer: ImageTokenizer | None, *objectives: object) -> SoftDiMO:
    return SoftDiMO(teacher=teacher, tokenizer=tokenizer, objectives=list(objectives))  # type: ignore[arg-type]


def _state(module: SoftDiMO, logits: Tensor, *, step: int = 0) -> DistillState:
    return DistillState(
        student=module.student,
        teacher=module.teacher,
        tokenizer=module.tokenizer,
        asked=LABELS,
        condition=module.teacher.encode(LABELS),
        logits=logits,
        tokens=logits.argmin(-1).detach(),
        batch={"label": LABELS, "ordinal": list(range(BATCH))},
        step=step,
        student_step=step,
        noise=lambda stream: SampleRandom(derive_seed(0, stream), range(BATCH), device=logits.device),
    )


def _logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, 16, 7, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()


def _images(tokenizer: ImageTokenizer, logits: Tensor) -> Tensor:
    return tokenizer.decode_embeddings(tokenizer.embed_soft(logits.softmax(-1)))


def _gradient(objective: Reward, module: SoftDiMO, logits: Tensor, *, step: int = 0) -> Tensor:
    (gradient,) = torch.autograd.grad(objective(_state(module, logits, step=step)).generator, logits)
    return gradient


@pytest.mark.parametrize("judge", [Pattern, _classifier])
@pytest.mark.parametrize("kind", ["soft", "soft_topk", "annealed"])
def test_generator_gradient_against_finite_differences(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer, kind: str, judge: Callable[[], RewardModel]
) -> None:
    relaxation = Relaxation(kind=kind, top_k=3, anneal_steps=10)  # type: ignore[arg-type]
    objective = Reward(rewards=[judge()], relaxation=relaxation)
    module = _module(teacher, tokenizer, objective).double()
    logits = _logits(torch.float64)
    gradient = _gradient(objective, module, logits, step=5)
    epsilon = 1e-5
    for seed in range(3):
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(10 + seed), dtype=torch.float64)
        with torch.no_grad():
            above = objective(_state(module, logits + epsilon * direction, step=5)).generator
            below = objective(_state(module, logits - epsilon * direction, step=5)).generator
        slope = ((above - below) / (2 * epsilon)).item()
        assert abs(slope) > 1e-5
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-7)


def test_value_is_minus_the_mean_composite_score(teacher: MaskedTransformer, tokenizer: ConvVQTokenizer) -> None:
    first, second = Pattern(name="first"), Pattern(name="second", seed=1)
    scale = Normalisation(mean=0.3, std=0.2)
    objective = Reward(rewards=[first, second], weights=[2.0, -0.5], normalisation={"first": scale}, micro_batch=4)
    module = _module(teacher, tokenizer, objective).double()
    logits = _logits(torch.float64)
    result = objective(_state(module, logits))
    images = _images(tokenizer, logits)
    a, b = first(images, LABELS), second(images, LABELS)
    expected = -(2.0 * (a - 0.3) / 0.2 - 0.5 * b).mean()
    assert result.generator.item() == pytest.approx(expected.item(), rel=1e-12)
    (by_hand,) = torch.autograd.grad(expected, logits)
    (got,) = torch.autograd.grad(result.generator, logits)
    torch.testing.assert_close(got, by_hand, rtol=1e-10, atol=1e-15)
    assert result.critic is None
    assert result.logs["score_first"].item() == pytest.approx(a.mean().item(), rel=1e-6)
    assert result.logs["score_second"].item() == pytest.approx(b.mean().item(), rel=1e-6)


@pytest.mark.parametrize("checkpoint_decoder", [False, True])
@pytest.mark.parametrize(("micro_batch", "parts"), [(0, [6]), (1, [1] * 6), (4, [4, 2])])
def test_micro_batches_and_checkpointing_leave_the_gradient_alone(
    teacher: MaskedTransformer,
    tokenizer: ConvVQTokenizer,
    micro_batch: int,
    parts: list[int],
    checkpoint_decoder: bool,
) -> None:
    objective = Reward(rewards=[Pattern()], micro_batch=micro_batch, checkpoint_decoder=checkpoint_decoder)
    module = _module(teacher, tokenizer, objective).double()
    logits = _logits(torch.float64)
    with count_calls(tokenizer.decoder) as decoded:
        result = objective(_state(module, logits))
    assert decoded.samples == [size for size in parts for _ in range(1 + checkpoint_decoder)]
    loss = -Pattern().double()(_images(tokenizer, logits), LABELS).mean()
    (expected,) = torch.autograd.grad(loss, logits)
    (got,) = torch.autograd.grad(result.generator, logits)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-15)
    assert result.generator.item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["soft", "st"])
def test_gradient_is_that_of_the_exact_expectation_where_decoder_and_reward_are_linear(kind: str) -> None:
    teacher, tokenizer = ToyMaskedModel.random(num_classes=3, num_sites=4, num_codes=3), ToyTokenizer(num_codes=3)
    tokenizer.levels.mul_(0.5).add_(0.25)  # away from the clamp to [0, 1]
    objective = Reward(rewards=[Brightness()], relaxation=Relaxation(kind=kind))  # type: ignore[arg-type]
    module = _module(teacher, tokenizer, objective).double()
    logits = torch.randn(BATCH, 4, 3, dtype=torch.float64).requires_grad_()
    got = _gradient(objective, module, logits)
    # Over all 81 images: sum of p(tokens) reward(decode(tokens)).
    states = teacher.states
    scores = tokenizer.decode(states).mean(dim=(1, 2, 3))
    log_p = logits.log_softmax(-1).unsqueeze(1).expand(-1, len(states), -1, -1)
    joint = log_p.gather(-1, states.expand(BATCH, -1, -1).unsqueeze(-1)).sum(dim=(-1, -2)).exp()
    (expected,) = torch.autograd.grad(-(joint * scores).sum(dim=1).mean(), logits)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("kind", ["st", "gumbel_st"])
def test_straight_through_scores_hard_decodings_with_the_soft_gradient_at_that_point(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer, kind: str
) -> None:
    relaxation = Relaxation(kind=kind, temperature=0.7)  # type: ignore[arg-type]
    objective, judge = Reward(rewards=[Pattern()], relaxation=relaxation), Pattern().double()
    module = _module(teacher, tokenizer, objective).double()
    logits = _logits(torch.float64)
    state = _state(module, logits)
    soft, tokens = probabilities(logits, temperature=0.7), state.tokens
    if kind == "gumbel_st":
        uniform = SampleRandom(STREAM, range(BATCH), device=logits.device).uniform(16, 7)
        soft = probabilities(logits + gumbel_noise(uniform), temperature=0.7)
        tokens = soft.argmax(-1)

    result = objective(state)

    hard = judge(tokenizer.decode(tokens), LABELS)
    assert result.generator.item() == pytest.approx(-hard.mean().item(), rel=1e-6)
    assert result.generator.item() != pytest.approx(-judge(_images(tokenizer, logits), LABELS).mean().item(), rel=1e-3)
    point = F.one_hot(tokens, 7).double().requires_grad_()
    loss = -judge(tokenizer.decode_embeddings(tokenizer.embed_soft(point)), LABELS).mean()
    (at_point,) = torch.autograd.grad(loss, point)
    (expected,) = torch.autograd.grad(soft, logits, at_point)
    (got,) = torch.autograd.grad(result.generator, logits)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-15)
    assert got.abs().amax(-1).min() > 0


def test_held_out_rewards_are_logged_now_and_then_and_never_climbed(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer
) -> None:
    watched = Pattern(name="other", seed=1)
    alone = Reward(rewards=[Pattern()])
    objective = Reward(rewards=[Pattern()], held_out=[watched], held_out_every=3, micro_batch=4)
    logits = _logits(torch.float64)
    plain = _gradient(alone, _module(teacher, tokenizer, alone).double(), logits)
    module = _module(teacher, tokenizer, objective).double()
    sampled = tokenizer.decode(_state(module, logits).tokens)
    expected, expected_hard = (judge(sampled, LABELS).mean().item() for judge in (watched, Pattern().double()))
    for step in range(6):
        result = objective(_state(module, logits, step=step))
        (got,) = torch.autograd.grad(result.generator, logits)
        torch.testing.assert_close(got, plain, rtol=1e-10, atol=1e-15)
        if step % 3 == 2:
            assert result.logs["held_out_other"].item() == pytest.approx(expected, rel=1e-6)
            assert result.logs["hard_score_pattern"].item() == pytest.approx(expected_hard, rel=1e-6)
        else:
            assert result.logs.keys().isdisjoint({"held_out_other", "hard_score_pattern"})
    assert "other" not in result.logs


def test_signs_of_hacking_are_logged_over_the_whole_batch(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer
) -> None:
    objective = Reward(rewards=[Pattern()], micro_batch=4)
    module, logits = _module(teacher, tokenizer, objective), _logits()
    logs = objective(_state(module, logits, step=7)).logs
    images, embeddings = _images(tokenizer, logits), tokenizer.embed_soft(logits.softmax(-1))
    assert logs.keys() == {"score_pattern", "saturation", "colour_entropy", "diversity"}
    assert logs["saturation"].item() == pytest.approx(saturation(images).item(), rel=1e-5) != 0
    assert logs["colour_entropy"].item() == pytest.approx(colour_entropy(images).item(), rel=1e-5) != 0
    assert logs["diversity"].item() == pytest.approx(diversity(embeddings, LABELS).item(), rel=1e-5) != 0


def test_automatic_weight_holds_the_ratio_of_the_gradients(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer
) -> None:
    dimo, reward = DiMO(guidance=1.5), Reward(rewards=[Pattern()], weight="auto", weight_ratio=0.5)
    module = _module(teacher, tokenizer, dimo, reward)
    with torch.no_grad():
        for parameter in dimo.auxiliary.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    logits = _logits()
    state = _state(module, logits)
    terms = weigh({"dimo": dimo(state), "reward": reward(state)}, {"dimo": dimo, "reward": reward}, logits)
    anchor, held = (torch.autograd.grad(terms[name].loss, logits)[0] for name in ("dimo", "reward"))
    assert held.norm().item() == pytest.approx(0.5 * anchor.norm().item(), rel=1e-5)
    alone = _gradient(reward, module, logits)
    assert F.cosine_similarity(held.flatten(), alone.flatten(), dim=0).item() == pytest.approx(1, abs=1e-6)


def test_heads_in_float32_have_gradients_in_float32_under_autocast(teacher: MaskedTransformer) -> None:
    head = 0.1 * torch.randn(192, 1, generator=torch.Generator().manual_seed(2))

    def score(images: Tensor) -> Tensor:
        with full_precision(images):
            return (images.flatten(1) @ head).squeeze(1).tanh()

    objective = Reward(rewards=[Scripted(score)])
    module = _module(teacher, ToyTokenizer(num_codes=7, grid=4, patch=2), objective)
    expected = _gradient(objective, module, _logits())
    logits = _logits()
    with torch.autocast("cpu", torch.bfloat16):
        result = objective(_state(module, logits))
    (got,) = torch.autograd.grad(result.generator, logits)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_rewards_are_frozen_and_registered_nowhere(teacher: MaskedTransformer, tokenizer: ConvVQTokenizer) -> None:
    climbed, watched = Pattern(name="climbed"), Pattern(name="watched")
    objective = Reward(rewards=[climbed], held_out=[watched])
    module = _module(teacher, tokenizer, DiMO(guidance=1.0), objective)
    module.train()
    for judge in (climbed, watched):
        assert not judge.training
        assert not judge.patterns.requires_grad
    assert list(objective.parameters()) == list(objective.buffers()) == []
    assert not any(name.startswith("objectives.1") for name in module.state_dict())
    assert {name.split(".")[0] for name in module.state_dict()} == {"student", "objectives"}
    assert [group.name for group in module.parameter_groups()] == ["student", "auxiliary"]
    module.double()
    assert climbed.patterns.dtype == watched.patterns.dtype == torch.float64


def _trainer(*callbacks: object, steps: int = 4) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )


@pytest.mark.filterwarnings("ignore:Class accuracy is not watched")
def test_training_moves_the_student_and_no_frozen_model(tokenizer: ConvVQTokenizer, tmp_path: Path) -> None:
    write_token_cache(tmp_path / "tokens", tokenizer, Digits(), progress=False)
    torch.manual_seed(1)
    teacher = MaskedTransformer(num_codes=7, num_sites=16, num_classes=10, width=8, depth=1, heads=1)
    judges = [
        ClassifierReward(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 10)), name=name)
        for name in ("judge", "other")
    ]
    objective = Reward(rewards=judges[:1], held_out=judges[1:], held_out_every=4, weight="auto", weight_ratio=0.5)
    module = SoftDiMO(
        teacher=teacher,
        tokenizer=tokenizer,
        objectives=[DiMO(guidance=1.5), GAN(), objective],
        optimizer=OptimizerConfig(lr=1e-2),
    )
    frozen: list[nn.Module] = [module.teacher, tokenizer, *judges]
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in frozen]
    start = {name: value.detach().clone() for name, value in module.student.named_parameters()}
    trainer = _trainer()

    trainer.fit(module, datamodule=TokenCache(tmp_path / "tokens", batch_size=16))

    for model, state in zip(frozen, before, strict=True):
        assert not model.training
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
    trained = {name: value for name, value in module.student.named_parameters() if value.requires_grad}
    assert all(not torch.equal(value, start[name]) for name, value in trained.items())
    logged = {name.removeprefix("train/reward") for name in trainer.callback_metrics if "train/reward" in name}
    extras = {
        "_score_judge",
        "_hard_score_judge",
        "_held_out_other",
        "_weight",
        "_saturation",
        "_colour_entropy",
        "_diversity",
    }
    assert logged == {"", *extras}
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == module.state_dict().keys()
    assert {"reward.rewards", "reward.held_out_other"} <= saved["frozen_fingerprints"].keys()


@pytest.mark.filterwarnings("ignore:Class accuracy is not watched")
@pytest.mark.parametrize(("accumulated", "step"), [(1, 3), (2, 2), (3, 1)])
def test_reward_that_turns_nan_in_training_stops_the_run_with_its_name(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer, accumulated: int, step: int
) -> None:
    calls = 0

    def turns(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1  # the first is the probe
        return images.mean(dim=(1, 2, 3)) * (float("nan") if calls > 3 else 1.0)

    objective = Reward(rewards=[Brightness(), Scripted(turns, name="turns")])
    module = _module(teacher, tokenizer, DiMO(guidance=1.5), objective)
    trainer = _trainer(StopOnNonFinite(check_every=1))
    trainer.accumulate_grad_batches = accumulated
    message = f"reward, reward_score_turns: expected a finite value, got NaN or infinity at step {step}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        trainer.fit(module, datamodule=Labels(3, batch_size=4))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda images: images.detach().mean(dim=(1, 2, 3)),
            "expected a gradient that reaches the pixels, got scores without a graph "
            "(detached, or computed under no_grad)",
        ),
        (
            lambda images: images.round().mean(dim=(1, 2, 3)),
            "expected a gradient that reaches the pixels, got zero at every pixel (rounded, or quantised)",
        ),
        (lambda images: images.mean(dim=(2, 3)), "expected scores of shape (2,), got shape (2, 3)"),
        (lambda images: images.mean(dim=(1, 2, 3)) * float("nan"), "expected finite scores, got nan"),
        (
            lambda images: (images - images.detach()).abs().sqrt().sum(dim=(1, 2, 3)),
            "expected finite gradients, got nan",
        ),
        (
            lambda images: (images @ torch.zeros(4, 1)).sum(dim=(1, 2, 3)),
            "expected to score images of 8x8 with a gradient, got an error "
            "(mat1 and mat2 shapes cannot be multiplied (48x8 and 4x1))",
        ),
    ],
)
def test_broken_reward_is_refused_before_training(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer, function: Callable[[Tensor], Tensor], message: str
) -> None:
    objective = Reward(rewards=[Brightness(), Scripted(function, name="broken")])
    with pytest.raises(ValueError, match=f"^{re.escape(f'reward broken: {message}')}$"):
        _module(teacher, tokenizer, DiMO(guidance=1.0), objective)


def test_reward_by_name() -> None:
    objective = Reward(rewards=[f"{__name__}.Pattern", Brightness()], held_out=[f"{__name__}:Redness"])
    assert objective.rewards.names == ("pattern", "Brightness")
    assert objective.frozen_modules().keys() == {"rewards", "held_out_Redness"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rewards": ["clap"]},
            r"reward: expected one of aesthetic, classifier, clip.*, or the dotted path of a class, got 'clap'",
        ),
        (
            {"rewards": [Brightness(), Brightness()]},
            "Reward.rewards: expected names that are unique, got 'Brightness' twice",
        ),
        (
            {"rewards": [Pattern()], "held_out": [Pattern(seed=1)]},
            "Reward.rewards: expected names that are unique, got 'pattern' twice",
        ),
        ({"rewards": []}, "rewards: expected at least one, got none"),
        ({"weights": [1.0, 2.0]}, "weights: expected one for each of the 1 rewards, got 2"),
        ({"normalisation": {"x": Normalisation()}}, "normalisation: expected names among Brightness, got x"),
        ({"micro_batch": -1}, "Reward.micro_batch: expected at least 0, got -1"),
        ({"held_out_every": 0}, "Reward.held_out_every: expected at least 1, got 0"),
        (
            {"relaxation": Relaxation(temperature=0.0)},
            "Reward.relaxation.temperature: expected a number above 0, got 0.0",
        ),
        ({"weight": -1.0}, "Reward.weight: expected 'auto' or a number of at least 0, got -1.0"),
        ({"weight_ratio": 0.0}, "Reward.weight_ratio: expected a number above 0, got 0.0"),
    ],
)
def test_impossible_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Reward(**{"rewards": [Brightness()], **options})  # type: ignore[arg-type]


def test_a_tokenizer_is_needed_to_decode(teacher: MaskedTransformer) -> None:
    message = "model.tokenizer: expected a tokenizer, since reward decodes images, got none"
    with pytest.raises(ValueError, match=f"^{message}$"):
        _module(teacher, None, DiMO(guidance=1.0), Reward(rewards=[Brightness()]))


def test_the_probe_asks_for_every_class(teacher: MaskedTransformer, tokenizer: ConvVQTokenizer) -> None:
    too_few = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, teacher.num_classes - 1))
    with pytest.raises(ValueError, match="reward classifier: expected labels in "):
        _module(teacher, tokenizer, Reward(rewards=[ClassifierReward(too_few)]))


def test_rewards_that_are_not_climbed_need_no_gradient_but_scores(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer
) -> None:
    class Detached(RewardModel):
        takes = "any"

        def forward(self, images: Tensor, conditions: object) -> Tensor:
            return images.detach().mean(dim=(1, 2, 3))

    class Scalar(Detached):
        def forward(self, images: Tensor, conditions: object) -> Tensor:
            return images.mean()

    _module(
        teacher,
        tokenizer,
        Reward(rewards=[Pattern(), Detached()], weights=[1.0, 0.0], held_out=[Detached(name="held")]),
    )
    with pytest.raises(ValueError, match="reward Scalar: expected scores of shape"):
        _module(teacher, tokenizer, Reward(rewards=[Pattern()], held_out=[Scalar()]))
