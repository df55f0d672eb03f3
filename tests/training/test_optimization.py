import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from softgen.models import MaskBit
from softgen.training import OptimizerConfig, ParameterGroup
from softgen.training.optimization import build_optimizer, hidden_matrices, lr_factor


def test_a_constant_rate_after_the_warm_up() -> None:
    factor = lr_factor(OptimizerConfig(warmup_steps=4), total_steps=100)
    assert [factor(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factor(1000) == 1.0
    assert lr_factor(OptimizerConfig(), total_steps=1)(0) == 1.0


def test_a_linear_fall() -> None:
    config = OptimizerConfig(warmup_steps=10, decay="linear", final_factor=0.2)
    factor = lr_factor(config, total_steps=110)
    assert [factor(step) for step in (10, 60, 110, 500)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_a_cosine_fall() -> None:
    factor = lr_factor(OptimizerConfig(decay="cosine", final_factor=0.1), total_steps=80)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2 for share in (0, 0.25, 0.5, 1)]
    assert [factor(step) for step in (0, 20, 40, 80)] == pytest.approx(expected)
    falling = [factor(step) for step in range(81)]
    assert falling == sorted(falling, reverse=True)


def test_a_warm_up_longer_than_the_run() -> None:
    factor = lr_factor(OptimizerConfig(warmup_steps=10, decay="linear"), total_steps=5)
    assert [factor(step) for step in (0, 9, 10, 11)] == pytest.approx([1 / 11, 10 / 11, 1.0, 0.0])


def test_groups_keep_their_names_and_settings_and_spare_vectors_the_decay() -> None:
    student, critic = nn.Linear(3, 2), nn.Linear(2, 1)
    critic.bias.requires_grad = False
    groups = [
        ParameterGroup("student", list(student.parameters()), OptimizerConfig(lr=0.1, weight_decay=0.5)),
        ParameterGroup("critic", list(critic.parameters()), OptimizerConfig(lr=0.2, betas=(0.0, 0.99), eps=1e-6)),
    ]
    optimizer = build_optimizer(groups, fused=False)
    seen = [
        (g["name"], g["lr"], g["betas"], g["eps"], g["weight_decay"], [p.shape for p in g["params"]])
        for g in optimizer.param_groups
    ]
    assert seen == [
        ("student", 0.1, (0.9, 0.999), 1e-8, 0.5, [(2, 3)]),
        ("student", 0.1, (0.9, 0.999), 1e-8, 0.0, [(2,)]),
        ("critic", 0.2, (0.0, 0.99), 1e-6, 0.0, [(1, 2)]),
    ]


@pytest.mark.parametrize("fused", [False, True])
def test_the_first_step_is_adams_with_decoupled_decay(fused: bool) -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    config = OptimizerConfig(lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer([ParameterGroup("product", [weight], config)], fused=fused)
    weight.grad = torch.tensor([[3.0, -4.0]])
    optimizer.step()
    # The first step is lr sign(gradient), after the weights shrank by lr * weight_decay.
    torch.testing.assert_close(weight.data, torch.tensor([[0.95 - 0.1, -1.9 + 0.1]]))


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 6)
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(6, 5)


def test_muon_takes_the_matrices_between_embeddings_and_head() -> None:
    model = _Small()
    taken = {id(matrix) for matrix in hidden_matrices(model)}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in taken]
    assert names == ["inner.weight", "attention.in_proj_weight", "attention.out_proj.weight"]


def _with_muon(weight: nn.Parameter, bias: nn.Parameter) -> torch.optim.Optimizer:
    config = OptimizerConfig(lr=0.1, muon_lr=0.02)
    return build_optimizer([ParameterGroup("product", [weight, bias], config, matrices=[weight])], fused=False)


def test_muons_step_is_orthogonal_beside_adams() -> None:
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(3))
    optimizer = _with_muon(weight, bias)
    weight.grad, bias.grad = torch.randn(4, 4), torch.tensor([1.0, -5.0, 0.1])
    optimizer.step()
    torch.testing.assert_close(bias.data, torch.tensor([-0.1, 0.1, -0.1]))
    singular = torch.linalg.svdvals(weight.data / 0.02)
    # Newton-Schulz in bfloat16 with Muon's coefficients ends between .68 and 1.13.
    assert 0.6 < singular.min() <= singular.max() < 1.2
    assert torch.einsum("ij,ij", weight.data, weight.grad) < 0


def test_muon_and_adam_go_on_from_their_state() -> None:
    def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            for index, parameter in enumerate(parameters):
                generator = torch.Generator().manual_seed(10 * step + index)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    straight = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(2))]
    whole = _with_muon(*straight)
    scheduler = torch.optim.lr_scheduler.LambdaLR(whole, lambda step: 0.5**step)
    run(whole, straight, range(2))
    scheduler.step()
    again = [nn.Parameter(parameter.data.clone()) for parameter in straight]
    resumed = _with_muon(*again)
    resumed.load_state_dict(deepcopy(whole.state_dict()))
    assert [group["lr"] for group in resumed.param_groups] == [0.05, 0.01]
    run(whole, straight, range(2, 4))
    run(resumed, again, range(2, 4))
    for one, other in zip(straight, again, strict=True):
        torch.testing.assert_close(one.data, other.data, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"muon_lr": -1.0}, "muon_lr: expected a number of at least 0, got -1.0"),
        ({"lr": -1e-3}, "lr: expected a number of at least 0, got -0.001"),
        ({"lr": math.nan}, "lr: expected a number of at least 0, got nan"),
        ({"lr": math.inf}, "lr: expected a number of at least 0, got inf"),
        ({"betas": (0.9, 1.0)}, "betas: expected two numbers in [0, 1), got [0.9, 1.0]"),
        ({"weight_decay": -0.1}, "weight_decay: expected a number of at least 0, got -0.1"),
        ({"warmup_steps": -1}, "warmup_steps: expected at least 0, got -1"),
        ({"decay": "step"}, "decay: expected one of constant, linear, cosine, got 'step'"),
        ({"final_factor": 1.5}, "final_factor: expected a number in [0, 1], got 1.5"),
        ({"eps": -1e-8}, "eps: expected a number of at least 0, got -1e-08"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    OptimizerConfig().check(key="model.optimizer")
    with pytest.raises(ValueError, match=r"^model\.optimizer") as caught:
        OptimizerConfig(**settings).check(key="model.optimizer")
    assert str(caught.value) == f"model.optimizer.{message}"


def test_a_held_group_starts_its_schedule_when_it_is_let_go() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, decay="cosine", final_factor=0.1)
    held = lr_factor(config, total_steps=30, first_step=10)
    free = lr_factor(config, total_steps=20)
    assert [held(step) for step in range(10, 31)] == [free(step) for step in range(21)]


def test_muon_leaves_the_outer_layers_of_maskbit() -> None:
    model = MaskBit(img_size=8, input_stride=4, bits=4, codebook_splits=2, hidden_dim=8, depth=1, heads=2, mlp_dim=8)
    taken = {id(matrix) for matrix in hidden_matrices(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in taken}
    assert names
    assert not names & {"input_proj.weight", "prediction_layer.weight"}
    assert {"input_proj.weight", "prediction_layer.weight"} <= {name for name, _ in model.named_parameters()}
