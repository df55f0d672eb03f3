"""One optimizer with named parameter groups, and its learning-rate schedule."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from softgen.training.muon import Muon

Decay = Literal["constant", "linear", "cosine"]

OUTER_LAYERS = frozenset({"head", "lm_head", "prediction_layer", "input_proj"})
"""What masked and autoregressive models call their linear input and output layers."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with decoupled weight decay, alone or beside Muon, and how its learning rate moves.

    Attributes:
        lr: Peak learning rate; at least 0.
        betas: Decay rates of Adam's two moments, each in [0, 1).
        weight_decay: Of matrices; vectors (biases, norms) have none.
        eps: Added to Adam's denominator.
        warmup_steps: Steps of linear warm-up from 0.
        decay: How the rate falls from the end of the warm-up to the last step.
        final_factor: Rate right after the last step as a share of `lr`, for linear and cosine decay.
        muon_lr: Peak learning rate of `softgen.training.muon.Muon`, which then trains the matrices between a model's
            embeddings and its output layer, in steps that are orthogonal matrices; Adam trains the rest. 0.02 suits
            small models. None for Adam alone.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    eps: float = 1e-8
    warmup_steps: int = 0
    decay: Decay = "constant"
    final_factor: float = 0.0
    muon_lr: float | None = None

    def check(self, *, key: str) -> None:
        """Refuse impossible settings.

        Raises:
            ValueError: Naming the key, what was expected and what was got.
        """
        if not self.lr >= 0 or math.isinf(self.lr):
            raise ValueError(f"{key}.lr: expected a number of at least 0, got {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"{key}.betas: expected two numbers in [0, 1), got {list(self.betas)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"{key}.weight_decay: expected a number of at least 0, got {self.weight_decay}")
        if not self.eps >= 0:
            raise ValueError(f"{key}.eps: expected a number of at least 0, got {self.eps}")
        if self.warmup_steps < 0:
            raise ValueError(f"{key}.warmup_steps: expected at least 0, got {self.warmup_steps}")
        if self.decay not in get_args(Decay):
            raise ValueError(f"{key}.decay: expected one of {', '.join(get_args(Decay))}, got {self.decay!r}")
        if self.muon_lr is not None and not 0 <= self.muon_lr < math.inf:
            raise ValueError(f"{key}.muon_lr: expected a number of at least 0, got {self.muon_lr}")
        if not 0 <= self.final_factor <= 1:
            raise ValueError(f"{key}.final_factor: expected a number in [0, 1], got {self.final_factor}")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share optimizer settings, clipped together.

    Attributes:
        name: Shown in the logs: `student`, `auxiliary`, ...
        parameters: Those with `requires_grad` are trained.
        config: The group's settings.
        first_step: Steps at the start in which the group is held: its schedule begins after them.
        matrices: Those among the parameters that Muon trains where the settings ask for it, see `hidden_matrices`.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    config: OptimizerConfig
    first_step: int = 0
    matrices: Sequence[nn.Parameter] = ()


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of a model's linear layers and attentions, but for its `OUTER_LAYERS`."""
    matrices: list[nn.Parameter] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in OUTER_LAYERS:
            matrices.append(module.get_parameter("weight"))
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            matrices.append(module.get_parameter("in_proj_weight"))
    return matrices


class AdamWAndMuon(torch.optim.Optimizer):
    """Two optimizers as one: their groups, state and steps together.

    Args:
        adamw: Over some parameters.
        muon: Over others.
    """

    def __init__(self, adamw: torch.optim.AdamW, muon: Muon) -> None:
        self._parts: tuple[torch.optim.Optimizer, ...] = (adamw, muon)
        self._sizes = [len(part.param_groups) for part in self._parts]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Both work on this optimizer's groups and state."""
        first = 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            part.param_groups = self.param_groups[first : first + size]
            part.state = self.state
            first += size

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each, after one call of the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def build_optimizer(groups: Iterable[ParameterGroup], *, fused: bool) -> torch.optim.Optimizer:
    """AdamW over the groups, and Muon over the matrices of those whose settings ask for it.

    A group with weight decay is split into matrices and vectors.

    Args:
        groups: At least one with something to train.
        fused: Use AdamW's fused kernel.
    """
    param_groups: list[dict[str, Any]] = []
    muon_groups: list[dict[str, Any]] = []
    for group in groups:
        config = group.config
        by_muon = {id(matrix) for matrix in group.matrices if config.muon_lr is not None}
        trainable = [parameter for parameter in group.parameters if parameter.requires_grad]
        matrices = [parameter for parameter in trainable if id(parameter) in by_muon]
        if matrices:
            muon_groups.append(
                {"name": group.name, "lr": config.muon_lr, "weight_decay": config.weight_decay, "params": matrices}
            )
        rest = [parameter for parameter in trainable if id(parameter) not in by_muon]
        decayed = [parameter for parameter in rest if config.weight_decay and parameter.ndim > 1]
        others = [parameter for parameter in rest if not (config.weight_decay and parameter.ndim > 1)]
        settings = {"name": group.name, "lr": config.lr, "betas": config.betas, "eps": config.eps}
        for parameters, weight_decay in ((decayed, config.weight_decay), (others, 0.0)):
            if parameters:
                param_groups.append({**settings, "params": parameters, "weight_decay": weight_decay})
    adamw = torch.optim.AdamW(param_groups, fused=fused)
    return AdamWAndMuon(adamw, Muon(muon_groups)) if muon_groups else adamw


def lr_factor(config: OptimizerConfig, *, total_steps: int, first_step: int = 0) -> Callable[[int], float]:
    """The share of the peak rate at each step: warm-up from `first_step`, then decay to `final_factor` at the end."""
    total_steps -= first_step

    def factor(step: int) -> float:
        step = max(0, step - first_step)
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        if config.decay == "constant":
            return 1.0
        progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
        falling = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return config.final_factor + (1 - config.final_factor) * falling

    return factor
