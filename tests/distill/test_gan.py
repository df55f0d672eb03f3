"""The GAN on soft embeddings: where gradients go, what they are, and what the options do."""

import re

import pytest
import torch
from torch import Tensor

from distill import GAN, DiMO, Sharpen, SoftDiMO
from distill.objectives import DistillState, ObjectiveLosses
from distill.weighting import weigh
from softgen.data import Digits, Labels
from softgen.models import MaskedTransformer
from softgen.random import SampleRandom, derive_seed
from softgen.relaxation import Relaxation, expected_embedding
from softgen.testing import count_calls
from softgen.tokenizers import ConvVQTokenizer
from softgen.training import OptimizerConfig

BATCH = 6


@pytest.fixture
def tokenizer() -> ConvVQTokenizer:
    return ConvVQTokenizer(image_size=8, num_codes=7, channels=[8, 8])


@pytest.fixture
def teacher() -> MaskedTransformer:
    model = MaskedTransformer(num_codes=7, num_sites=16, num_classes=3, width=8, depth=2, heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _module(teacher: MaskedTransformer, tokenizer: ConvVQTokenizer, *objectives: object) -> SoftDiMO:
    return SoftDiMO(teacher=teacher, tokenizer=tokenizer, objectives=list(objectives))  # type: ignore[arg-type]


def _state(module: SoftDiMO, logits: Tensor, step: int = 0) -> DistillState:
    images = torch.rand(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    tokens = (7 * images[:, 0, ::2, ::2]).long().flatten(1)
    return DistillState(
        student=module.student,
        teacher=module.teacher,
        tokenizer=module.tokenizer,
        asked=torch.arange(BATCH) % 3,
        condition=module.teacher.encode(torch.arange(BATCH) % 3),
        logits=logits,
        tokens=logits.argmax(-1).detach(),
        batch={
            "token": tokens,
            "image": images,
            "ordinal": list(range(BATCH)),
        },
        step=step,
        student_step=step,
        noise=lambda stream: SampleRandom(derive_seed(0, stream), range(BATCH), device=logits.device),
    )


def _logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, 16, 7, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
@pytest.mark.parametrize("head", ["pooled", "per_token", "spatial"])
def test_gradients_go_where_they_belong(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer, loss: str, head: str
) -> None:
    gan = GAN(loss=loss, head=head)  # type: ignore[arg-type]
    module = _module(teacher, tokenizer, DiMO(guidance=1.0), gan)
    logits = _logits()
    result = gan(_state(module, logits))

    (to_logits,) = torch.autograd.grad(result.generator, logits, retain_graph=True)
    assert to_logits.abs().sum() > 0
    assert all(
        grad is None
        for grad in torch.autograd.grad(
            result.generator, list(gan.heads.parameters()), retain_graph=True, allow_unused=True
        )
    )
    (critic_to_logits,) = torch.autograd.grad(result.critic, logits, retain_graph=True, allow_unused=True)
    assert critic_to_logits is None
    result.critic.backward()
    assert all(parameter.grad is not None for parameter in gan.heads.parameters())
    assert all(parameter.grad is None for parameter in module.teacher.parameters())


@pytest.mark.parametrize("kind", ["soft", "soft_topk", "annealed"])
def test_generator_gradient_against_finite_differences(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer, kind: str
) -> None:
    gan = GAN(mask_ratio=(0.2, 0.5), relaxation=Relaxation(kind=kind, top_k=3, anneal_steps=10))
    module = _module(teacher.double(), tokenizer, gan).double()
    for parameter in gan.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    logits = _logits(torch.float64)
    (gradient,) = torch.autograd.grad(gan(_state(module, logits, step=5)).generator, logits)
    direction = torch.randn_like(logits)
    epsilon = 1e-5
    with torch.no_grad():
        above = gan(_state(module, logits + epsilon * direction, step=5)).generator
        below = gan(_state(module, logits - epsilon * direction, step=5)).generator
    slope = ((above - below) / (2 * epsilon)).item()
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


def test_the_temperature_falls_with_the_steps_of_the_student(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer
) -> None:
    falling = GAN(relaxation=Relaxation(kind="annealed", final_temperature=0.25, anneal_steps=10))
    still = GAN(relaxation=Relaxation(temperature=0.5))
    module = _module(teacher, tokenizer, falling)
    _module(teacher, tokenizer, still)
    still.heads.load_state_dict(falling.heads.state_dict())
    losses = [gan(_state(module, _logits(), step=5)).generator for gan in (falling, still)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert falling(_state(module, _logits())).generator.item() != pytest.approx(losses[0].item(), rel=1e-4)


@pytest.mark.parametrize("penalised", ["r1", "r2"])
def test_a_penalty_is_the_squared_slope_of_the_verdicts_on_one_side(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer, penalised: str
) -> None:
    plain, gan = GAN(), GAN(penalty_noise=0.05, **{penalised: 3.0})  # type: ignore[arg-type]
    module = _module(teacher.double(), tokenizer, gan).double()
    _module(teacher, tokenizer, plain)
    plain.double().heads.load_state_dict(gan.heads.state_dict())
    state = _state(module, _logits(torch.float64))
    noise, condition = state.noise("gan"), teacher.pool(state.condition)
    embeddings = {"r2": gan._fake_embeddings(state, noise), "r1": gan._real_embeddings(state, noise)}[penalised]
    shift = 0.05 * noise.normal(*embeddings.shape[1:]).double()
    at, beside = (
        gan.heads(teacher.forward_with_taps(x, state.condition, [0, 1]).hidden, condition)
        for x in (embeddings, embeddings + shift)
    )
    penalty = 3.0 * (beside - at).square().mean() / 0.05**2
    assert penalty.item() > 1e-4
    with_penalty, without = gan(state).critic, plain(state).critic
    assert with_penalty is not None
    assert without is not None
    assert (with_penalty - without).item() == pytest.approx(penalty.item(), rel=1e-6)


def test_only_visible_sites_have_a_gradient(teacher: MaskedTransformer, tokenizer: ConvVQTokenizer) -> None:
    gan = GAN(mask_ratio=(0.5, 0.5))
    module = _module(teacher, tokenizer, gan)
    logits = _logits()
    (gradient,) = torch.autograd.grad(gan(_state(module, logits)).generator, logits)
    moved = (gradient.abs().sum(-1) > 0).sum(dim=-1)
    assert moved.tolist() == [8] * BATCH


def test_one_student_pass_and_two_of_the_teacher_beside_those_of_dimo(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer
) -> None:
    dimo = DiMO(guidance=1.0)
    module = _module(teacher, tokenizer, dimo, GAN())
    module.report = lambda batch, losses, logs: sum(losses.values())  # type: ignore[method-assign, assignment, return-value]
    batch = {**_state(module, _logits()).batch, "label": torch.arange(BATCH) % 3}
    with (
        count_calls(module.student.model) as student,
        count_calls(module.teacher) as frozen,
        count_calls(dimo.auxiliary) as auxiliary,
    ):
        module.training_step(batch, 0)
    assert student.samples == [BATCH]
    assert auxiliary.samples == [BATCH]
    assert frozen.samples == [BATCH] * 3


def test_automatic_weight_holds_the_ratio_of_the_gradients(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer
) -> None:
    dimo, gan = DiMO(guidance=1.5), GAN(weight="auto", weight_ratio=0.5)
    module = _module(teacher, tokenizer, dimo, gan)
    with torch.no_grad():
        for parameter in dimo.auxiliary.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    logits = _logits()
    state = _state(module, logits)
    results = {"dimo": dimo(state), "gan": gan(state)}
    terms = weigh(results, {"dimo": dimo, "gan": gan}, logits)
    norms = [torch.autograd.grad(terms[name].loss, logits, retain_graph=True)[0].norm() for name in ("dimo", "gan")]
    assert norms[1].item() == pytest.approx(0.5 * norms[0].item(), rel=1e-5)
    plain = torch.autograd.grad(dimo(state).generator, logits)[0].norm()
    assert norms[0].item() == pytest.approx(plain.item(), rel=1e-5)


def test_weighed_gradients_are_those_of_a_backward_pass_outside_of_autocast() -> None:
    logits, table = _logits(), torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    parts = {"dimo": DiMO(), "gan": GAN(weight="auto")}

    def pulled() -> Tensor:
        return expected_embedding(logits.softmax(-1), table).square().sum()

    (expected,) = torch.autograd.grad(pulled(), logits)
    with torch.autocast("cpu", torch.bfloat16):
        terms = weigh({name: ObjectiveLosses(generator=pulled()) for name in parts}, parts, logits)
    for term in terms.values():
        (got,) = torch.autograd.grad(term.loss, logits)
        torch.testing.assert_close(got, expected)


def _bare_state(logits: Tensor) -> DistillState:
    return DistillState(
        student=None,  # type: ignore[arg-type]
        teacher=None,  # type: ignore[arg-type]
        tokenizer=None,
        asked=(),
        condition=None,  # type: ignore[arg-type]
        logits=logits,
        tokens=logits.argmax(-1),
        batch={},
        step=0,
        student_step=0,
        noise=None,  # type: ignore[arg-type]
    )


def test_sharpen_lowers_entropy() -> None:
    logits = torch.tensor([[[2.0, 1.0, 0.0]]], requires_grad=True)
    loss = Sharpen()(_bare_state(logits)).generator
    expected = torch.distributions.Categorical(logits=logits.detach()).entropy().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 0, 0] < 0 < gradient[0, 0, 2]


def test_sharpen_of_a_student_whose_probabilities_underflow() -> None:
    logits = torch.tensor([[[200.0, 0.0, -200.0], [1.0, 0.0, -200.0]]], requires_grad=True)
    state = _bare_state(logits)
    (gradient,) = torch.autograd.grad(Sharpen()(state).generator, logits)
    assert gradient[0, 0].tolist() == [0.0, 0.0, 0.0]
    assert gradient[0, 1].isfinite().all()
    assert gradient[0, 1, 0] < 0 < gradient[0, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": [2]}, "GAN.taps: expected layers in 0..1, got 2"),
        ({"mask_ratio": (0.5, 1.0)}, "GAN.mask_ratio: expected two rising numbers in [0, 1), got [0.5, 1.0]"),
        (
            {"relaxation": Relaxation(kind="hard")},  # type: ignore[arg-type]
            "GAN.relaxation.kind: expected one of soft, gumbel_st, st, soft_topk, annealed "
            "(hard tokens have no gradient), got 'hard'",
        ),
        ({"optimizer": OptimizerConfig(muon_lr=0.1)}, "GAN.optimizer.muon_lr: expected none, got 0.1"),
        ({"taps": []}, "GAN.taps: expected at least one layer, got none"),
        ({"head_width": 0}, "GAN.head_width: expected at least 1, got 0"),
        ({"weight": "atuo"}, "GAN.weight: expected 'auto' or a number of at least 0, got 'atuo'"),
        ({"weight": -1.0}, "GAN.weight: expected 'auto' or a number of at least 0, got -1.0"),
        ({"head": "global"}, "GAN.head: expected one of pooled, per_token, spatial, got 'global'"),
    ],
)
def test_impossible_options(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _module(teacher, tokenizer, GAN(**options))  # type: ignore[arg-type]


def test_needs_images_and_an_anchor(teacher: MaskedTransformer, tokenizer: ConvVQTokenizer) -> None:
    module = _module(teacher, tokenizer, DiMO(guidance=1.0), GAN())
    with pytest.raises(ValueError, match="data: expected real images or tokens, since gan needs them, got none"):
        module.check_data(Labels(num_classes=3))
    with pytest.raises(ValueError, match=r"gan\.weight: expected a number for the first objective, the anchor"):
        _module(teacher, tokenizer, GAN(weight="auto"))
    with pytest.raises(ValueError, match=r"data.num_classes: expected 3 as the model has, got 10"):
        module.check_data(Digits())


def test_an_automatic_weight_lets_a_satisfied_objective_go(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer
) -> None:
    dimo, sharpen = DiMO(guidance=1.5), Sharpen(weight="auto")
    module = _module(teacher, tokenizer, dimo, sharpen)
    with torch.no_grad():
        for parameter in dimo.auxiliary.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    one_hot = (1e4 * torch.eye(7)[torch.arange(16) % 7]).expand(BATCH, -1, -1).clone().requires_grad_()
    state = _state(module, one_hot)
    terms = weigh({"dimo": dimo(state), "sharpen": sharpen(state)}, {"dimo": dimo, "sharpen": sharpen}, one_hot)
    assert float(terms["sharpen"].weight) == 0
    assert terms["sharpen"].loss.isfinite()
    nearly = _logits().detach().mul(1e-12).requires_grad_()  # uniform: the entropy's gradient all but vanishes
    state = _state(module, nearly)
    terms = weigh({"dimo": dimo(state), "sharpen": sharpen(state)}, {"dimo": dimo, "sharpen": sharpen}, nearly)
    assert float(terms["sharpen"].weight) == 1000


@pytest.mark.parametrize("head", ["pooled", "per_token", "spatial"])
def test_verdicts_stay_float32_under_autocast(
    teacher: MaskedTransformer, tokenizer: ConvVQTokenizer, head: str
) -> None:
    gan = GAN(head=head)  # type: ignore[arg-type]
    _module(teacher, tokenizer, gan)
    features = [torch.randn(BATCH, 16, 8) for _ in range(2)]
    condition = torch.eye(4)[torch.arange(BATCH) % 3]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = gan.heads(features, condition)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, gan.heads(features, condition))


def test_soft_and_hard_embeddings_agree_under_autocast(teacher: MaskedTransformer) -> None:
    tokens = torch.arange(16).remainder(7).expand(2, -1)
    with torch.autocast("cpu", torch.bfloat16):
        soft = teacher.embed_soft(torch.nn.functional.one_hot(tokens, 7).float())
        assert torch.equal(soft, teacher.embed(tokens))


def test_the_masks_do_not_depend_on_the_relaxation(teacher: MaskedTransformer, tokenizer: ConvVQTokenizer) -> None:
    seen = []
    for kind in ("soft", "gumbel_st"):
        gan = GAN(mask_ratio=(0.5, 0.5), relaxation=Relaxation(kind=kind))  # type: ignore[arg-type]
        module = _module(teacher, tokenizer, gan)
        logits = _logits()
        (gradient,) = torch.autograd.grad(gan(_state(module, logits)).generator, logits)
        seen.append(gradient.abs().sum(-1) > 0)
    assert torch.equal(*seen)
