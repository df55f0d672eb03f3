"""Velocity matching, the samplers of a SiT, and both commands on one."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from softgen.callbacks import ResumeCheckpoint, StudentEMA
from softgen.data import Digits
from softgen.data.base import Batch
from softgen.evaluate import main as evaluate
from softgen.flow import FlowSampler, draw_times, interpolate, velocity_loss
from softgen.generation import balanced_labels, flow_latents, generate
from softgen.models import SiT
from softgen.models.conditions import ClassCondition, Condition
from softgen.random import SampleRandom
from softgen.sample import main as sample
from softgen.testing import count_calls
from softgen.tokenizers import SoftVQ
from softgen.training import FlowTraining, OptimizerConfig

VIT = {"width": 16, "depth": 1, "heads": 2, "patch_size": 2}
CPU = torch.device("cpu")


def softvq(**changes: Any) -> SoftVQ:
    torch.manual_seed(0)
    options: dict[str, Any] = {"image_size": 8, "num_latents": 4, "codebook_size": 12, "latent_dim": 3, "groups": 1}
    built = SoftVQ(**{**options, "encoder": VIT, "decoder": VIT, "distance": "l2", **changes})
    with torch.no_grad():
        latents = built.encode(Digits().train_source().fetch(range(200))["image"])
    built.set_statistics(mean=float(latents.mean()), std=float(latents.std()))
    return built.eval()


def sit(**changes: Any) -> SiT:
    torch.manual_seed(1)
    options: dict[str, Any] = {"num_latents": 4, "latent_dim": 3, "num_classes": 10, "width": 16, "depth": 2}
    return SiT(**{**options, "heads": 2, **changes})


def moved(model: SiT) -> SiT:
    """With weights at which classes and times matter."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def build(**options: Any) -> FlowTraining:
    return FlowTraining(**{"tokenizer": softvq(), "model": sit(), "optimizer": OptimizerConfig(lr=3e-3), **options})


def batch(count: int = 8) -> Batch:
    source = Digits().train_source()
    return {"ordinal": list(range(count)), "index": list(range(count)), **source.fetch(range(count))}


class Linear:
    """v = -a x, whose path from t = 1 to 0 multiplies x by exp(a)."""

    num_latents, latent_dim, has_null_condition = 2, 3, True

    def __init__(self, rate: float = 1.0) -> None:
        self.rate = rate

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, ClassCondition)
        return -self.rate * (1 + t.view(-1, 1, 1)) * x_t


def test_a_new_model_says_nothing_and_keeps_its_input() -> None:
    model, x = sit(), torch.randn(2, 4, 3)
    condition = model.encode(torch.tensor([1, 2]))
    assert (model(x, torch.rand(2), condition) == 0).all()
    told = torch.randn(2, 16)
    embedded = torch.randn(2, 4, 16)
    assert torch.equal(model.blocks[0](embedded, told), embedded)


def test_labels_that_are_no_classes_are_refused() -> None:
    model = sit()
    with pytest.raises(ValueError, match=rf"^labels: expected ids in 0..{model.num_classes - 1}, got "):
        model.encode(torch.tensor([0, model.num_classes]))


def test_the_model_sees_time_class_and_place() -> None:
    model, x = moved(sit()), torch.randn(1, 4, 3).expand(2, 4, 3)
    condition, times = model.encode(torch.tensor([1, 1])), torch.tensor([0.5, 0.5])
    same = model(x, times, condition)
    torch.testing.assert_close(same[0], same[1])
    by_time = model(x, torch.tensor([0.5, 0.501]), condition)
    assert (by_time[0] - by_time[1]).abs().max() > 1e-4
    by_class = model(x, times, model.encode(torch.tensor([1, 2])))
    assert (by_class[0] - by_class[1]).abs().max() > 1e-3
    dropped = model(x, times, model.encode(torch.tensor([1, 2])).drop())
    torch.testing.assert_close(dropped[0], dropped[1])
    assert (model(x[:1].flip(1), times[:1], condition[:1]).flip(1) - same[:1]).abs().max() > 1e-3


def test_the_loss_is_its_closed_form() -> None:
    """For x_0 ~ N(m, s^2) the best velocity is known, and so is its loss."""
    m, s, t, n = 0.7, 0.5, 0.3, 400_000
    generator = torch.Generator().manual_seed(0)
    x_0 = m + s * torch.randn(n, 1, 1, generator=generator, dtype=torch.float64)
    eps = torch.randn(n, 1, 1, generator=generator, dtype=torch.float64)
    x_t = interpolate(x_0, eps, torch.full((n,), t))
    torch.testing.assert_close(x_t, (1 - t) * x_0 + t * eps)
    variance = (1 - t) ** 2 * s**2 + t**2
    slope = (t - (1 - t) * s**2) / variance
    best = -m + slope * (x_t - (1 - t) * m)
    expected = 1 + s**2 - (t - (1 - t) * s**2) ** 2 / variance
    assert velocity_loss(best, x_0, eps).item() == pytest.approx(expected, rel=0.01)
    assert velocity_loss(torch.zeros_like(x_0), x_0, eps).item() == pytest.approx(1 + s**2 + m**2, rel=0.01)


def test_the_step_trains_on_what_it_says() -> None:
    stage = build(model=moved(sit()), label_dropout=0.5)
    kept: dict[str, Tensor] = {}
    stage.report = lambda batch, losses, logs: kept.update(losses) or torch.zeros(())  # type: ignore[assignment, method-assign, func-returns-value]
    stage.training_step(batch(), 0)
    given = batch()
    noise = stage.noise(given, "flow")
    dropped = noise.uniform() < 0.5
    assert dropped.any()
    assert not dropped.all()
    tokenizer = stage.tokenizer
    x_0 = (tokenizer.encode(given["image"]) - tokenizer.latent_mean) / tokenizer.latent_std
    t, eps = noise.uniform(), noise.normal(4, 3)
    x_t = (1 - t.view(-1, 1, 1)) * x_0 + t.view(-1, 1, 1) * eps
    velocity = stage.model(x_t, t, stage.model.encode(given["label"]).drop(dropped))
    torch.testing.assert_close(kept["velocity"], (velocity - (eps - x_0)).square().mean())


def test_time_laws() -> None:
    noise = SampleRandom(0, range(4000), device=CPU)
    uniform = draw_times("uniform", noise)
    assert 0 <= uniform.min() <= uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    logits = torch.logit(draw_times("logit_normal", noise, mean=0.5, std=2.0))
    assert logits.mean().item() == pytest.approx(0.5, abs=0.13)
    assert logits.std().item() == pytest.approx(2, abs=0.1)
    with pytest.raises(ValueError, match=r"^time_law: expected one of uniform, logit_normal, got 'cosine'$"):
        draw_times("cosine", noise)  # type: ignore[arg-type]


def order(method: Any) -> float:
    """Measured order of a method on v = -(1 + t) x, whose path multiplies x by exp(3 / 2)."""
    errors = []
    condition = ClassCondition.of(torch.zeros(3, dtype=torch.long))
    for steps in (20, 40):
        noise = SampleRandom(0, range(3), device=CPU)
        start = SampleRandom(0, range(3), device=CPU).normal(2, 3).double()

        class Wide:
            def normal(self, *shape: int, noise: SampleRandom = noise) -> Tensor:
                return noise.normal(*shape).double()

        got = FlowSampler(steps=steps, method=method)(Linear(), condition, Wide())
        errors.append((got - start * math.exp(1.5)).abs().max().item())
    return math.log2(errors[0] / errors[1])


def test_orders_of_convergence() -> None:
    assert order("heun") == pytest.approx(2, abs=0.1)
    assert order("euler") == pytest.approx(1, abs=0.15)


def test_guidance_of_one_is_the_conditional_model_in_one_pass() -> None:
    model = moved(sit())
    condition = model.encode(torch.tensor([3, 4]))

    def noise() -> SampleRandom:
        return SampleRandom(0, range(2), device=CPU)

    with count_calls(model) as calls:
        plain = FlowSampler(steps=3, method="euler")(model, condition, noise())
    assert calls.calls == 3
    x = noise().normal(4, 3)
    with torch.no_grad():
        for time in (1.0, 2 / 3, 1 / 3):
            x = x - model(x, torch.full((2,), time), condition) / 3
    torch.testing.assert_close(plain, x)
    guided = FlowSampler(steps=3, method="euler", guidance=1.0001)(model, condition, noise())
    torch.testing.assert_close(guided, plain, rtol=1e-3, atol=1e-3)
    assert not torch.equal(guided, plain)
    with count_calls(model) as calls:
        FlowSampler(steps=3, method="heun", guidance=2.0)(model, condition, noise())
    assert calls.calls == 6, "both branches go in one pass"


def test_guidance_is_off_outside_its_interval() -> None:
    model = moved(sit())
    condition = model.encode(torch.tensor([3, 4]))
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))

    def run(**options: Any) -> Tensor:
        seen.clear()
        return FlowSampler(steps=4, method="euler", **options)(model, condition, SampleRandom(0, range(2), device=CPU))

    inside = run(guidance=3.0, guidance_interval=(0.0, 0.5))
    assert seen == [2, 2, 4, 4], "times 1, 0.75, 0.5, 0.25"
    plain = run()
    assert seen == [2, 2, 2, 2]
    assert not torch.equal(inside, plain)
    everywhere = run(guidance=3.0)
    assert seen == [4, 4, 4, 4]
    assert not torch.equal(everywhere, inside)
    never = run(guidance=3.0, guidance_interval=(0.1, 0.2))
    assert torch.equal(never, plain)
    hook.remove()


def test_the_mean_of_a_constant_flow_is_recovered() -> None:
    """A model that is trained on latents of one point ends there."""

    class ToPoint:
        num_latents, latent_dim, has_null_condition = 1, 2, False

        def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return (x_t - 5) / t.view(-1, 1, 1)

    condition = ClassCondition.of(torch.zeros(2, dtype=torch.long))
    got = FlowSampler(steps=5, method="euler")(ToPoint(), condition, SampleRandom(0, range(2), device=CPU))
    torch.testing.assert_close(got, torch.full((2, 1, 2), 5.0))
    with pytest.raises(ValueError, match=r"^guidance: expected 1, since this model has no null condition, got 2.0$"):
        FlowSampler(guidance=2.0)(ToPoint(), condition, SampleRandom(0, range(2), device=CPU))


def test_images_do_not_depend_on_the_batch_size() -> None:
    tokenizer, model = softvq(), moved(sit())
    source = flow_latents(model, FlowSampler(steps=2, guidance=2.0), tokenizer)
    labels = balanced_labels(5, num_classes=10)
    whole = generate(source, tokenizer, labels, seed=0)
    assert whole.images.shape == (5, 3, 8, 8)
    parts = generate(source, tokenizer, labels, seed=0, batch_size=2)
    torch.testing.assert_close(parts.images, whole.images)


def fit(stage: FlowTraining, folder: Path, *, steps: int, resume: Path | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=1,
            callbacks=[ResumeCheckpoint(run_dir=str(folder), every_n_steps=4), StudentEMA(decay=0.9)],
        ).fit(stage, datamodule=Digits(batch_size=128), ckpt_path=resume, weights_only=True if resume else None)


def test_the_loss_falls_and_a_run_in_two_parts_ends_bit_equal(tmp_path: Path) -> None:
    whole = build(time_law="logit_normal")
    fit(whole, tmp_path / "whole", steps=12)
    fit(build(time_law="logit_normal"), tmp_path / "parts", steps=8)
    resumed = build(time_law="logit_normal")
    fit(resumed, tmp_path / "parts", steps=12, resume=tmp_path / "parts" / "checkpoints" / "step_00000008.ckpt")
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    assert not any("tokenizer" in name for name in whole.state_dict())
    fit(whole, tmp_path / "longer", steps=200)
    stage, first = build(), []
    for each in (stage, whole):
        each.report = lambda batch, losses, logs: first.append(losses["velocity"].item()) or torch.zeros(())  # type: ignore[assignment, method-assign, func-returns-value]
        each.training_step(batch(200), 0)
    assert first[1] < 0.9 * first[0]
    assert build().preview(batch(3)).shape == (3, 3, 8, 8)


def saved(folder: Path) -> str:
    moved(sit()).save_pretrained(folder / "model", tokenizer=softvq())
    return str(folder / "model")


def test_both_commands_open_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path)
    words = ["--model", model, "--steps", "2", "--guidance", "1.5", "--guidance_interval", "[0.0, 0.7]"]
    sample([*words, "--out", str(tmp_path / "out"), "--n", "4", "--labels", "[3]", "--device", "cpu"])
    assert (tmp_path / "out" / "grid.png").is_file()
    assert len(list((tmp_path / "out" / "images").iterdir())) == 4
    capsys.readouterr()
    extractor = ["--extractor", str(tmp_path / "extractor"), "--n", "40", "--threads", "1", "--device", "cpu"]
    evaluate(
        ["--model", model, "--steps", "[1, 2]", "--sampler", "euler", *extractor, "--out", str(tmp_path / "x.json")]
    )
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["euler_1", "euler_2"]
    assert all(row["fd"] > 0 and row["n"] == 40 for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampler", "halton"], "sampler: expected one of euler, heun for a SiT, got 'halton'"),
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--labels", "[10]"], "labels: expected classes in 0..9, got 10"),
        (
            ["--guidance_interval", "[0.7, 0.2]"],
            "guidance_interval: expected two rising numbers in [0, 1], got [0.7, 0.2]",
        ),
        (["--prompts", "[a]"], "prompts: expected labels, since this model is class-conditional, got prompts"),
    ],
)
def test_options_that_do_not_fit(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        sample(["--model", saved(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu", *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == f"softgen.sample: error: {message}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_law": "cosine"}, "model.time_law: expected one of uniform, logit_normal, got 'cosine'"),
        ({"time_std": 0.0}, "model.time_std: expected a number above 0, got 0.0"),
        ({"label_dropout": 2.0}, "model.label_dropout: expected a number in [0, 1], got 2.0"),
        ({"model": sit(num_latents=5)}, "model.tokenizer.num_latents: expected 5 as the model has, got 4"),
        ({"model": sit(latent_dim=2)}, "model.tokenizer.latent_dim: expected 2 as the model has, got 3"),
        (
            {"model": sit(num_classes=0), "preview_guidance": 2.0},
            "model.preview_guidance: expected 1, since the model has no classes, got 2.0",
        ),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        build(**options)
    assert str(caught.value) == message


def test_latents_that_are_not_normalised_are_told_of(tmp_path: Path) -> None:
    tokenizer = softvq()
    tokenizer.set_statistics(mean=3.0, std=1.0)
    stage = build(tokenizer=tokenizer)
    with pytest.warns(UserWarning, match=r"^model.tokenizer: its normalised latents have mean -\d"):
        Trainer(
            accelerator="cpu",
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
        ).fit(stage, datamodule=Digits(batch_size=128))
