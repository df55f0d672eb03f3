"""Teacher training: every target, data that is tokenised already, and what 2 tau^2 becomes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from softgen.data import Digits, TokenCache, write_token_cache
from softgen.data.base import Batch
from softgen.models import AutoregressiveTransformer, MaskedTransformer
from softgen.models.blocks import whiten
from softgen.relaxation import NeighbourTable
from softgen.tokenizers import ConvVQTokenizer
from softgen.training import OptimizerConfig, TeacherTraining


@pytest.fixture
def tokenizer() -> ConvVQTokenizer:
    return ConvVQTokenizer(image_size=8, num_codes=12, code_dim=4, channels=[8, 8])


def _stage(tokenizer: ConvVQTokenizer, **options: object) -> TeacherTraining:
    model = MaskedTransformer(num_codes=12, num_sites=16, num_classes=10, width=16, depth=1, heads=2)
    return TeacherTraining(
        tokenizer=tokenizer,
        model=model,
        optimizer=OptimizerConfig(lr=3e-3),
        **options,  # type: ignore[arg-type]
    )


def _autoregressive(tokenizer: ConvVQTokenizer, **options: object) -> TeacherTraining:
    model = AutoregressiveTransformer(num_codes=12, num_sites=16, num_classes=10, width=16, depth=1, heads=2)
    return TeacherTraining(
        tokenizer=tokenizer,
        model=model,
        optimizer=OptimizerConfig(lr=3e-3),
        **options,  # type: ignore[arg-type]
    )


def _trainer(steps: int, **options: Any) -> Trainer:
    return Trainer(
        **options,
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )


def _batch(count: int = 32) -> Batch:
    source = Digits().train_source()
    return {"ordinal": list(range(count)), "index": list(range(count)), **source.fetch(range(count))}


def _loss(stage: TeacherTraining, batch: Batch) -> float:
    losses: dict[str, Tensor] = {}

    def keep(batch: Batch, named: dict[str, Tensor], logs: object) -> Tensor:
        losses.update(named)
        return named[stage.target]

    stage.report = keep  # type: ignore[assignment, method-assign]
    with torch.no_grad():
        stage.training_step(batch, 0)
    return losses[stage.target].item()


@pytest.mark.parametrize("target", ["hard", "label_smoothing", "snce"])
@pytest.mark.parametrize("weighting", ["uniform", "elbo"])
def test_loss_falls(tokenizer: ConvVQTokenizer, target: str, weighting: str) -> None:
    law = "linear" if weighting == "elbo" else "arccos"
    stage = _stage(tokenizer, target=target, weighting=weighting, mask_law=law)
    data = Digits(batch_size=64)
    _trainer(1).fit(stage, datamodule=data)
    before = _loss(stage, _batch(256))
    del stage.report  # type: ignore[attr-defined]
    _trainer(40).fit(stage, datamodule=data)
    assert _loss(stage, _batch(256)) < 0.9 * before


@pytest.mark.parametrize("target", ["hard", "snce"])
def test_an_autoregressive_teacher_learns_and_draws(tokenizer: ConvVQTokenizer, target: str) -> None:
    stage = _autoregressive(tokenizer, target=target)
    data = Digits(batch_size=64)
    _trainer(1).fit(stage, datamodule=data)
    before = _loss(stage, _batch(256))
    del stage.report  # type: ignore[attr-defined]
    _trainer(40).fit(stage, datamodule=data)
    assert _loss(stage, _batch(256)) < 0.9 * before
    assert stage.preview(_batch(8)).shape == (8, 3, 8, 8)


def test_auto_two_tau_squared_is_settled_on_the_data(tokenizer: ConvVQTokenizer) -> None:
    stage = _stage(tokenizer, target="snce")
    _trainer(1).fit(stage, datamodule=Digits(batch_size=64))
    latents = tokenizer.latents(Digits().train_source().fetch(range(256))["image"]).flatten(0, 1)
    gaps = torch.cdist(latents, tokenizer.codebook).amin(dim=1).square()
    assert stage.two_tau_squared == pytest.approx(3.5 * gaps.median().item(), rel=1e-3)


@pytest.mark.parametrize("two_tau_squared", ["auto", 1])
@pytest.mark.parametrize("run", ["validate", "test"])
def test_a_teacher_that_nothing_has_fitted_can_be_validated(
    tokenizer: ConvVQTokenizer, two_tau_squared: object, run: str
) -> None:
    stage = _stage(tokenizer, target="snce", two_tau_squared=two_tau_squared)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=1, limit_test_batches=1
    )
    (values,) = getattr(trainer, run)(stage, datamodule=Digits(batch_size=64), verbose=False)
    assert isinstance(stage.two_tau_squared, float)
    assert 0 < values["val/snce"] < 10


def test_pretokenised_data_uses_the_code_vectors(tokenizer: ConvVQTokenizer) -> None:
    stage = _stage(tokenizer, target="snce", two_tau_squared=0.3, label_dropout=0.0)
    batch = _batch()
    tokens = tokenizer.encode(batch["image"])
    stored = {"ordinal": batch["ordinal"], "token": tokens, "label": batch["label"]}
    from_codes = _loss(stage, stored)

    original: Callable[[Tensor], Tensor] = tokenizer.latents
    tokenizer.latents = lambda images: tokenizer.codebook[tokens]  # type: ignore[method-assign]
    assert _loss(stage, batch) == pytest.approx(from_codes, rel=1e-6)
    tokenizer.latents = original  # type: ignore[method-assign]
    assert _loss(stage, batch) != pytest.approx(from_codes, rel=1e-3)


def test_token_noise_shows_tokens_of_the_next_image(tokenizer: ConvVQTokenizer) -> None:
    seen: list[Tensor] = []
    stage = _stage(tokenizer, token_noise=0.4, label_dropout=0.0, mask_law="square")
    batch = _batch(1000)
    tokens = tokenizer.encode(batch["image"])
    stage.model.embed = lambda tokens: seen.append(tokens) or MaskedTransformer.embed(stage.model, tokens)  # type: ignore[method-assign, func-returns-value]
    _loss(stage, batch)
    following = tokens.roll(-1, dims=0)
    visible = seen[0] != stage.model.mask_id
    assert ((seen[0] == tokens) | (seen[0] == following))[visible].all()
    differs = visible & (tokens != following)
    share = ((seen[0] != tokens) & visible).sum(dim=1) / differs.sum(dim=1)
    many = share[differs.sum(dim=1) >= 6]
    assert len(many) > 200
    assert (many > 0).float().mean().item() == pytest.approx(0.4 * 0.93, abs=0.08)
    assert many.mean().item() == pytest.approx(0.2, abs=0.04)
    assert (many > 0.9).any(), "any share of them"


def test_token_noise_needs_another_image(tokenizer: ConvVQTokenizer) -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size: expected at least 2 with token_noise, got 1"):
        _trainer(1).fit(_stage(tokenizer, token_noise=0.1), datamodule=Digits(batch_size=1))


@pytest.mark.parametrize("name", ["token_noise", "label_dropout"])
def test_a_share_outside_its_range_is_refused(tokenizer: ConvVQTokenizer, name: str) -> None:
    with pytest.raises(ValueError, match=rf"model.{name}: expected a number in \[0, 1\], got 1.5"):
        _stage(tokenizer, **{name: 1.5})


def test_a_preview_of_no_steps_is_refused(tokenizer: ConvVQTokenizer) -> None:
    with pytest.raises(ValueError, match=r"^model.preview_steps: expected at least 1, got 0$"):
        _stage(tokenizer, preview_steps=0)


def test_a_run_in_bfloat16_goes_on_from_its_checkpoint(tokenizer: ConvVQTokenizer, tmp_path: Path) -> None:
    """The trainer narrows what is held frozen, and the tokenizer has to be known as the same one all the same."""
    path = str(tmp_path / "first.ckpt")
    for steps, start in ((1, None), (2, path)):
        stage = _stage(copy.deepcopy(tokenizer))
        trainer = _trainer(steps, precision="bf16-true")
        trainer.fit(stage, datamodule=Digits(batch_size=32), ckpt_path=start, weights_only=True)
        assert trainer.global_step == steps
        assert stage.tokenizer.codebook.dtype == torch.bfloat16
        trainer.save_checkpoint(path)


def test_trains_on_a_token_cache(tokenizer: ConvVQTokenizer, tmp_path: Path) -> None:
    write_token_cache(tmp_path / "tokens", tokenizer, Digits(), progress=False)
    stage = _stage(tokenizer)
    trainer = _trainer(3)
    trainer.fit(stage, datamodule=TokenCache(str(tmp_path / "tokens"), batch_size=32))
    assert trainer.global_step == 3


def test_elbo_masks_every_number_of_sites_as_often(tokenizer: ConvVQTokenizer) -> None:
    """As eq. 15 has it for t that is uniform."""
    stage = _stage(tokenizer, weighting="elbo", mask_law="linear")
    seen: list[Tensor] = []

    def keep(embeddings: Tensor, condition: object, example: object, weights: Tensor) -> Tensor:
        seen.append((weights > 0).sum(dim=1))
        return weights.sum()

    stage._weighted_loss = keep  # type: ignore[assignment, method-assign]
    _loss(stage, _batch(1408))
    counts = torch.bincount(seen[0], minlength=17)
    assert counts[0] == 0
    assert (
        (counts[1:] - 88).abs() < 30
    ).all()  # 3.3 standard deviations; rounding t N would give 132 and 44 at the ends


def test_elbo_needs_the_law_that_it_is_of(tokenizer: ConvVQTokenizer) -> None:
    with pytest.raises(ValueError, match=r"^model.mask_law: expected linear with weighting elbo, got arccos$"):
        _stage(tokenizer, weighting="elbo")


def test_tokens_go_with_a_tokenizer_whose_type_the_trainer_has_changed(
    tokenizer: ConvVQTokenizer, tmp_path: Path
) -> None:
    write_token_cache(tmp_path / "tokens", tokenizer, Digits(), progress=False)
    data = TokenCache(str(tmp_path / "tokens"), batch_size=32)
    stage = _stage(tokenizer)
    stage.check_data(data)
    stage.to(torch.bfloat16)
    stage.check_data(data)


@pytest.mark.filterwarnings("ignore:.*num_workers")
def test_a_two_tau_squared_that_is_given_needs_no_data_module(tokenizer: ConvVQTokenizer) -> None:
    loader = DataLoader([_batch()], batch_size=None)
    _trainer(1).fit(_stage(tokenizer, target="snce", two_tau_squared=0.3), train_dataloaders=loader)
    with pytest.raises(ValueError, match=r"^data: expected an ImageDataModule, .* measured on, got bare loaders$"):
        _trainer(1).fit(_stage(tokenizer, target="snce"), train_dataloaders=loader)


def test_elbo_weights_by_the_mask_ratio(tokenizer: ConvVQTokenizer) -> None:
    """With constant logits the per-site loss is log K, so eq. 15's estimate is log K exactly, whatever t."""
    stage = _stage(tokenizer, weighting="elbo", mask_law="linear")
    with torch.no_grad():
        stage.model.head.weight.zero_()  # type: ignore[union-attr, operator]
        stage.model.head.bias.zero_()  # type: ignore[union-attr, operator]
    assert _loss(stage, _batch()) == pytest.approx(torch.tensor(12.0).log().item(), rel=1e-5)


@pytest.mark.parametrize("target", ["hard", "label_smoothing", "snce"])
@pytest.mark.parametrize("weighting", ["uniform", "elbo"])
@pytest.mark.parametrize("build", [_stage, _autoregressive])
def test_the_fused_loss_is_the_dense_one_and_says_so_once(
    tokenizer: ConvVQTokenizer,
    build: Callable[..., TeacherTraining],
    weighting: str,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    law = "linear" if weighting == "elbo" else "arccos"
    stage = build(tokenizer, target=target, weighting=weighting, mask_law=law)
    torch.nn.init.normal_(stage.model.head.weight)  # type: ignore[union-attr, arg-type]
    _trainer(1).fit(stage, datamodule=Digits(batch_size=8))
    stage.report = lambda batch, losses, logs: losses[target]  # type: ignore[method-assign]
    gradients, values = [], []
    for limit in (10**9, 0):
        monkeypatch.setattr("softgen.training.teacher.DENSE_LIMIT", limit)
        stage.zero_grad()
        loss = stage.training_step(_batch(8), 0)
        loss.backward()
        values.append(loss.item())
        gradients.append([parameter.grad.clone() for parameter in stage.parameters() if parameter.grad is not None])
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    for dense, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, dense, rtol=1e-4, atol=1e-6)
    stage.training_step(_batch(8), 0)
    assert capsys.readouterr().err.count("the fused loss is used") == 1


def test_a_neighbour_table_serves_stored_tokens(tokenizer: ConvVQTokenizer, tmp_path: Path) -> None:
    NeighbourTable.build(tokenizer.codebook, two_tau_squared=0.3, neighbours=12).save(tmp_path / "table.safetensors")
    stage = _stage(tokenizer, target="snce", neighbour_table=str(tmp_path / "table.safetensors"), label_dropout=0.0)
    assert stage.two_tau_squared == pytest.approx(0.3)
    batch = _batch()
    stored = {"ordinal": batch["ordinal"], "token": tokenizer.encode(batch["image"]), "label": batch["label"]}
    exact = _stage(tokenizer, target="snce", two_tau_squared=0.3, label_dropout=0.0)
    exact.model.load_state_dict(stage.model.state_dict())
    # Of images it takes the codes too.
    assert _loss(stage, batch) == pytest.approx(_loss(stage, stored), rel=1e-6)
    assert _loss(stage, stored) == pytest.approx(_loss(exact, stored), rel=1e-5)
    write_token_cache(tmp_path / "tokens", tokenizer, Digits(), progress=False)
    del stage.report  # type: ignore[attr-defined]
    _trainer(2).fit(stage, datamodule=TokenCache(str(tmp_path / "tokens"), batch_size=32))


def test_a_neighbour_table_is_checked(tokenizer: ConvVQTokenizer) -> None:
    table = NeighbourTable.build(tokenizer.codebook, two_tau_squared=0.3, neighbours=12)
    with pytest.raises(ValueError, match=r"^model.neighbour_table: expected target snce with it, got hard$"):
        _stage(tokenizer, neighbour_table=table)
    with pytest.raises(
        ValueError, match=r"^model.two_tau_squared: expected auto, or 0.3 as the neighbour table, got 1"
    ):
        _stage(tokenizer, target="snce", two_tau_squared=1.0, neighbour_table=table)
    other = ConvVQTokenizer(image_size=8, num_codes=12, code_dim=4, channels=[8, 8])
    with pytest.raises(ValueError, match=r"^model.neighbour_table: expected a table of the codebook"):
        _stage(other, target="snce", neighbour_table=table)


def test_auto_two_tau_squared_from_stored_tokens(
    tokenizer: ConvVQTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_token_cache(tmp_path / "tokens", tokenizer, Digits(), progress=False)
    stage = _stage(tokenizer, target="snce")
    _trainer(1).fit(stage, datamodule=TokenCache(str(tmp_path / "tokens"), batch_size=32))
    between = torch.cdist(tokenizer.codebook, tokenizer.codebook).square().fill_diagonal_(torch.inf).amin(-1)
    assert isinstance(stage.two_tau_squared, float)
    assert 3.5 * between.min().item() <= stage.two_tau_squared <= 3.5 * between.max().item() + 1e-6
    assert "perplexity of q: median" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["codebook", "whitened_codebook"])
@pytest.mark.parametrize("build", [_stage, _autoregressive])
def test_embeddings_can_start_from_the_codebook(
    tokenizer: ConvVQTokenizer, build: Callable[..., TeacherTraining], start: str
) -> None:
    table = build(tokenizer, embedding_init=start).model.token_embedding.weight  # type: ignore[union-attr]
    assert isinstance(table, Tensor)
    rows = table[:12].detach()
    torch.testing.assert_close(rows.mean(0), torch.zeros(16), rtol=0, atol=1e-5)
    assert rows.std().item() == pytest.approx(1, abs=1e-4)
    # A projection of the centred codes: what is in their span, no more.
    centred = tokenizer.codebook - tokenizer.codebook.mean(0)
    solution = torch.linalg.lstsq(centred, rows).solution
    torch.testing.assert_close(centred @ solution, rows, rtol=1e-3, atol=1e-3)
    again = build(tokenizer, embedding_init=start).model.token_embedding.weight  # type: ignore[union-attr]
    assert torch.equal(again[:12], rows)  # type: ignore[index]


def test_a_whitened_start_projects_the_whitened_codes(tokenizer: ConvVQTokenizer) -> None:
    rows = _stage(tokenizer, embedding_init="whitened_codebook").model.token_embedding.weight[:12].detach()  # type: ignore[union-attr,index]
    plain = _stage(tokenizer, embedding_init="codebook").model.token_embedding.weight[:12].detach()  # type: ignore[union-attr,index]
    centred, whitened = tokenizer.codebook - tokenizer.codebook.mean(0), whiten(tokenizer.codebook)
    # One projection of both, up to the scale that gives the values a standard deviation of 1.
    projections = [torch.linalg.lstsq(*pair).solution for pair in ((centred, plain), (whitened, rows))]
    torch.testing.assert_close(*[part / part.norm() for part in projections], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("start", ["codebook", "whitened_codebook"])
@pytest.mark.parametrize("build", [_stage, _autoregressive])
def test_the_output_layer_can_start_along_the_embeddings(
    tokenizer: ConvVQTokenizer, build: Callable[..., TeacherTraining], start: str
) -> None:
    model = build(tokenizer, embedding_init=start, head_init=start).model
    rows, head = model.token_embedding.weight[:12], model.head.weight  # type: ignore[union-attr,index]
    assert isinstance(head, Tensor)
    torch.testing.assert_close(head, 4 / 16 * rows)
    assert not torch.allclose(build(tokenizer, embedding_init=start).model.head.weight, head)  # type: ignore[union-attr,arg-type]


def test_the_start_of_embeddings_is_checked(tokenizer: ConvVQTokenizer) -> None:
    known = "random, codebook, whitened_codebook"
    with pytest.raises(ValueError, match=f"^model.embedding_init: expected {known}, got 'zeros'$"):
        _stage(tokenizer, embedding_init="zeros")
    with pytest.raises(ValueError, match=f"^model.head_init: expected {known}, got 'zeros'$"):
        _stage(tokenizer, head_init="zeros")
