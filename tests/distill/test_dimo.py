import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import DiMO, SoftDiMO
from distill.objectives.base import DistillState, ObjectiveLosses
from softgen.categorical import sample_categorical
from softgen.data import Batch
from softgen.models import ClassCondition, MaskedTransformer, OneStepGenerator
from softgen.random import SampleRandom, derive_seed
from softgen.testing import ToyMaskedModel, count_calls
from softgen.training import OptimizerConfig

B, N, K = 3, 6, 5
LABELS = torch.tensor([0, 1, 2])
BATCH: Batch = {"ordinal": [4, 5, 6], "index": [0, 1, 2], "label": LABELS}
OPTIMIZER = OptimizerConfig(lr=1e-3)

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


def transformer(**changes: Any) -> MaskedTransformer:
    """A float64 model with random modulation and head, which start as constants."""
    settings = {"num_codes": K, "num_sites": N, "num_classes": 3, "width": 8, "depth": 2, "heads": 2}
    torch.manual_seed(1)
    model = MaskedTransformer(**{**settings, **changes}).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def perturb(model: nn.Module) -> None:
    """Move a copy of the teacher away from it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)


@dataclass
class Case:
    """A stage, one step's state with the student's logits as a leaf, and the step's mask."""

    stage: SoftDiMO
    objective: DiMO
    state: DistillState
    mask: Tensor

    def losses(self) -> ObjectiveLosses:
        losses = self.objective(self.state)
        assert isinstance(losses, ObjectiveLosses)
        return losses


def case(**settings: Any) -> Case:
    objective = DiMO(**settings)
    stage = SoftDiMO(teacher=transformer(), objectives=[objective], optimizer=OPTIMIZER, seed=7)
    perturb(stage.student)
    perturb(objective.auxiliary)
    noise = SampleRandom(derive_seed(7, "student"), BATCH["ordinal"], device=torch.device("cpu"))
    condition = ClassCondition.of(LABELS)
    logits = stage.student(stage.student.init(noise), condition).detach().requires_grad_()
    state = DistillState(
        student=stage.student,
        teacher=stage.teacher,
        tokenizer=None,
        asked=LABELS,
        condition=condition,
        logits=logits,
        tokens=sample_categorical(logits.detach(), noise),
        batch=BATCH,
        step=0,
        student_step=0,
        noise=lambda stream: stage.noise(BATCH, stream),
    )
    return Case(stage, objective, state, expected_mask(settings.get("mask_law", "arccos")))


def expected_mask(law: str) -> Tensor:
    """The re-masked sites, drawn anew from the documented streams."""
    noise = SampleRandom(derive_seed(7, "dimo"), BATCH["ordinal"], device=torch.device("cpu"))
    ratios = [math.acos(u) * 2 / math.pi if law == "arccos" else u for u in noise.uniform().tolist()]
    mask = torch.zeros(B, N, dtype=torch.bool)
    for row, ratio, order in zip(mask, ratios, noise.uniform(N).argsort(-1), strict=True):
        row[order[: max(1, round(N * ratio))]] = True
    assert 0 < mask.sum() < B * N
    return mask


def expected_gradient(
    step: Case, *, beta: float, guidance: float | Tensor, temperatures: tuple[float, float]
) -> Tensor:
    """Autograd of the true divergence, by the auxiliary's logits, at the masked sites."""
    teacher, auxiliary = step.stage.teacher, step.objective.auxiliary
    seen = torch.where(step.mask, K, step.state.tokens)
    labels = ClassCondition.of(LABELS)
    with torch.no_grad():
        conditional = teacher(teacher.embed(seen), labels)
        unconditional = teacher(teacher.embed(seen), labels.drop())
        q = ((unconditional + guidance * (conditional - unconditional)) / temperatures[0]).log_softmax(-1)
    scores = (auxiliary(auxiliary.embed(seen), labels) / temperatures[1]).detach().requires_grad_()
    p = scores.log_softmax(-1)
    forward, reverse = (q.exp() * (q - p)).sum(-1), (p.exp() * (p - q)).sum(-1)
    (gradient,) = torch.autograd.grad((((1 - beta) * forward + beta * reverse) * step.mask).sum(), scores)
    return gradient


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3, -0.2])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_gradient_on_the_students_logits(beta: float, guidance: float) -> None:
    step = case(beta=beta, guidance=guidance)
    (got,) = torch.autograd.grad(step.losses().generator, step.state.logits)
    expected = expected_gradient(step, beta=beta, guidance=guidance, temperatures=(1, 1)) / B
    assert ((got - expected).norm() / expected.norm()).item() <= 1e-10
    assert got[~step.mask].abs().max() == 0
    assert (got[step.mask].abs().amax(-1) > 1e-6).all()


def test_linear_guidance_is_none_where_all_is_masked() -> None:
    step = case(guidance=4.0, guidance_schedule="linear")
    (got,) = torch.autograd.grad(step.losses().generator, step.state.logits)
    masked = step.mask.double().mean(dim=1)
    scales = (masked + (1 - masked) * 4.0)[:, None, None]
    assert len(scales.unique()) > 1
    expected = expected_gradient(step, beta=0.0, guidance=scales, temperatures=(1, 1)) / B
    assert ((got - expected).norm() / expected.norm()).item() <= 1e-6, "scales are in single precision"
    everything = case(guidance=4.0, guidance_schedule="linear", mask_range=(1.0, 1.0))
    unguided = case(guidance=1.0, mask_range=(1.0, 1.0))
    torch.testing.assert_close(everything.losses().generator, unguided.losses().generator, rtol=1e-12, atol=0)


def test_the_temperatures_and_the_mean_reduction() -> None:
    step = case(beta=0.3, teacher_temperature=2.0, auxiliary_temperature=0.5, reduction="mean")
    (got,) = torch.autograd.grad(step.losses().generator, step.state.logits)
    expected = expected_gradient(step, beta=0.3, guidance=2.0, temperatures=(2.0, 0.5)) / step.mask.sum()
    assert ((got - expected).norm() / expected.norm()).item() <= 1e-10


def test_the_mask_law_is_used() -> None:
    step = case(mask_law="linear")
    assert not torch.equal(step.mask, expected_mask("arccos"))
    (got,) = torch.autograd.grad(step.losses().generator, step.state.logits)
    assert torch.equal(got.abs().amax(-1) > 0, step.mask)


def test_the_generators_value_is_the_divergence() -> None:
    step = case(guidance=1.0)
    seen = torch.where(step.mask, K, step.state.tokens)
    labels, teacher, auxiliary = ClassCondition.of(LABELS), step.stage.teacher, step.objective.auxiliary
    q = teacher(teacher.embed(seen), labels).log_softmax(-1)
    p = auxiliary(auxiliary.embed(seen), labels).log_softmax(-1)
    per_site = (q.exp() * (q - p)).sum(-1)[step.mask]
    losses = step.losses()
    assert losses.generator.item() == pytest.approx(per_site.sum().item() / B, rel=1e-10)
    assert losses.logs["divergence_per_site"].item() == pytest.approx(per_site.mean().item(), rel=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_auxiliary_learns_the_sampled_tokens_at_masked_sites_alone(smoothing: float) -> None:
    step = case(auxiliary_label_smoothing=smoothing)
    trained = [p for p in step.objective.auxiliary.parameters() if p.requires_grad]
    critic = step.losses().critic
    assert critic is not None
    got = torch.autograd.grad(critic, trained)
    seen = torch.where(step.mask, K, step.state.tokens)
    logits = step.objective.auxiliary(step.objective.auxiliary.embed(seen), ClassCondition.of(LABELS))
    log_p = logits.log_softmax(-1)
    right = log_p.gather(-1, step.state.tokens.unsqueeze(-1)).squeeze(-1)
    per_site = -(1 - smoothing) * right - smoothing * log_p.mean(-1)
    loss = per_site[step.mask].mean()
    assert critic.item() == pytest.approx(loss.item(), rel=1e-6)
    for ours, expected in zip(got, torch.autograd.grad(loss, trained), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-8)


def test_each_term_reaches_its_own_weights_alone() -> None:
    step = case()
    step.stage.teacher.requires_grad_()  # even so
    noise = step.stage.noise(BATCH, "student")
    logits = step.stage.student(step.stage.student.init(noise), ClassCondition.of(LABELS))
    object.__setattr__(step.state, "logits", logits)
    losses = step.losses()
    assert losses.critic is not None
    student = [p for p in step.stage.student.parameters() if p.requires_grad]
    auxiliary = [p for p in step.objective.auxiliary.parameters() if p.requires_grad]
    teacher = list(step.stage.teacher.parameters())

    def reached(loss: Tensor, parameters: list[nn.Parameter]) -> list[bool]:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return [gradient is not None for gradient in gradients]

    assert all(reached(losses.generator, student))
    assert all(reached(losses.critic, auxiliary))
    assert not any(reached(losses.generator, auxiliary + teacher))
    assert not any(reached(losses.critic, student + teacher))


def test_a_training_step_moves_the_student_by_that_gradient() -> None:
    step = case(weight=0.5)
    step.stage.training_step(BATCH, 0).backward()
    got = {name: p.grad for name, p in step.stage.student.named_parameters() if p.grad is not None}
    reference = copy.deepcopy(step.stage.student)
    reference.zero_grad()
    noise = SampleRandom(derive_seed(7, "student"), BATCH["ordinal"], device=torch.device("cpu"))
    gradient = expected_gradient(step, beta=0.0, guidance=2.0, temperatures=(1, 1)) / B
    reference(reference.init(noise), ClassCondition.of(LABELS)).backward(0.5 * gradient)
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    assert "model.token_embedding.weight" not in got
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-12)
    assert all(p.grad is None for p in step.stage.teacher.parameters())
    losses = step.losses()
    assert step.stage.latest_losses.keys() == {"dimo", "dimo_critic"}
    assert step.stage.latest_losses["dimo"].item() == pytest.approx(0.5 * losses.generator.item())


@pytest.mark.parametrize(("guidance", "teacher_batch"), [(1.0, B), (2.0, 2 * B)])
def test_a_training_step_is_one_pass_of_each_model(guidance: float, teacher_batch: int) -> None:
    step = case(guidance=guidance)
    with (
        count_calls(step.stage.student.model) as student,
        count_calls(step.objective.auxiliary) as auxiliary,
        count_calls(step.stage.teacher) as teacher,
    ):
        step.stage.training_step(BATCH, 0)
    assert (student.samples, auxiliary.samples, teacher.samples) == ([B], [B], [teacher_batch])


def test_steps_are_functions_of_the_seed_and_the_ordinals() -> None:
    losses = []
    for ordinals in ([4, 5, 6], [4, 5, 6], [7, 8, 9]):
        step = case()
        losses.append(step.stage.training_step({**BATCH, "ordinal": ordinals}, 0).item())
    assert losses[0] == losses[1] != losses[2]


def test_what_is_trained_and_what_is_frozen() -> None:
    stage = SoftDiMO(teacher=transformer(), objectives=[DiMO()], optimizer=OPTIMIZER)
    objective = next(iter(stage.objectives))
    assert isinstance(objective, DiMO)
    groups = {group.name: group for group in stage.parameter_groups()}
    assert list(groups) == ["student", "auxiliary"]
    for model in (stage.student.model, objective.auxiliary):
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert (frozen, model.training) == ({"token_embedding.weight"}, True)
        state = stage.teacher.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in stage.teacher.parameters())
    assert not stage.teacher.training
    assert groups["auxiliary"].config == OPTIMIZER
    assert not any(name.startswith("teacher") for name, _ in stage.named_parameters())
    free = SoftDiMO(
        teacher=transformer(),
        objectives=[DiMO(freeze_embedding=False, auxiliary_optimizer=OptimizerConfig(lr=0.5))],
        freeze_embedding=False,
    )
    assert all(p.requires_grad for p in free.parameters())
    assert {group.name: group.config.lr for group in free.parameter_groups()} == {"student": 1e-5, "auxiliary": 0.5}


def test_the_student_learns_a_one_site_teacher() -> None:
    # With one site, one step can be exact: the fixed point is the teacher's distribution.
    teacher = ToyMaskedModel.random(num_classes=2, num_sites=1, num_codes=4, spread=1.5)
    start = ToyMaskedModel.random(num_classes=2, num_sites=1, num_codes=4, spread=1.5, seed=5)
    student = OneStepGenerator(start, r_init=1.0, noise=0.0)
    objective = DiMO(guidance=1.0, auxiliary_label_smoothing=0.0)
    stage = SoftDiMO(teacher=teacher, student=student, objectives=[objective], optimizer=OPTIMIZER)
    optimizer = torch.optim.Adam([p for p in stage.parameters() if p.requires_grad], lr=0.03, betas=(0.5, 0.99))
    classes = ClassCondition.of(torch.tensor([0, 1]))

    def distance() -> float:
        return (start.joint(classes) - teacher.joint(classes)).abs().sum(-1).max().item() / 2

    assert distance() > 0.4
    for step in range(150):
        ordinals = list(range(64 * step, 64 * step + 64))
        optimizer.zero_grad()
        stage.training_step({"ordinal": ordinals, "label": torch.tensor(ordinals) % 2}, step).backward()
        optimizer.step()
    assert distance() < 0.1


def test_guidance_needs_a_null_condition() -> None:
    message = r"^DiMO.guidance: expected 1, since this model has no null condition, got 2.0$"
    with pytest.raises(ValueError, match=message):
        SoftDiMO(teacher=transformer(null_condition=False), objectives=[DiMO(guidance=2.0)])
    SoftDiMO(teacher=transformer(null_condition=False), objectives=[DiMO(guidance=1.0)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_temperature": 0.0}, "DiMO.teacher_temperature: expected a number above 0, got 0.0"),
        ({"auxiliary_temperature": -1.0}, "DiMO.auxiliary_temperature: expected a number above 0, got -1.0"),
        (
            {"auxiliary_label_smoothing": 1.5},
            r"DiMO.auxiliary_label_smoothing: expected a number in \[0, 1\], got 1.5",
        ),
        ({"reduction": "max"}, "DiMO.reduction: expected sum or mean, got 'max'"),
        (
            {"guidance_schedule": "cosine"},
            "DiMO.guidance_schedule: expected constant or linear, got 'cosine'",
        ),
        ({"weight": -1.0}, "DiMO.weight: expected 'auto' or a number of at least 0, got -1.0"),
        (
            {"auxiliary_optimizer": OptimizerConfig(lr=-1.0)},
            "DiMO.auxiliary_optimizer.lr: expected a number of at least 0, got -1.0",
        ),
        (
            {"mask_law": "root"},
            "DiMO.mask_law: expected one of linear, square, cosine, arccos, mage, got 'root'",
        ),
        ({"beta": float("nan")}, "DiMO.beta: expected a finite number, got nan"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        DiMO(**settings)


def test_two_objectives_of_one_name_are_refused() -> None:
    message = r"^model.objectives: expected objectives of different names, got dimo, dimo$"
    with pytest.raises(ValueError, match=message):
        SoftDiMO(teacher=transformer(), objectives=[DiMO(), DiMO(beta=1.0)])


def test_the_re_mask_ratio_stays_in_its_range() -> None:
    part = case(mask_range=(0.5, 0.75))
    sites = part.state.teacher.num_sites
    counts = [int(count) for count in part.objective._remask(part.state).sum(dim=1)]
    assert all(0.5 * sites <= count <= 0.75 * sites for count in counts)
    free = case()
    assert any(not 0.5 * sites <= int(count) <= 0.75 * sites for count in free.objective._remask(free.state).sum(dim=1))


@pytest.mark.parametrize("mask_range", [(-0.1, 1.0), (0.5, 0.4), (0.0, 1.1)])
def test_a_re_mask_range_that_is_none(mask_range: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"^DiMO.mask_range: expected 0 <= least <= largest <= 1, got "):
        DiMO(mask_range=mask_range)


def test_a_student_of_the_teachers_own_weights_is_refused() -> None:
    teacher = MaskedTransformer(num_codes=7, num_sites=5, num_classes=3, width=8, depth=1, heads=1)
    with pytest.raises(ValueError, match=r"^model\.student: expected weights of its own, got those of the teacher"):
        SoftDiMO(teacher=teacher, student=OneStepGenerator(teacher))
