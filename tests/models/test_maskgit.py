"""MaskGIT and its published sampler, on tiny random weights."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from softgen.categorical import StoredNoise
from softgen.masking import Schedule
from softgen.models import ClassCondition, MaskGIT
from softgen.random import SampleRandom
from softgen.samplers.maskgit import PublishedMaskGITSampler, published_reveal_counts
from softgen.testing import ToyMaskedModel

B, N, V, C, D = 3, 4, 5, 3, 8


def build(**changes: object) -> MaskGIT:
    settings = {"img_size": 32, "hidden_dim": D, "codebook_size": V, "depth": 2, "heads": 2, "mlp_dim": 12, "nclass": C}
    model = MaskGIT(**{**settings, **changes})  # type: ignore[arg-type]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs() -> tuple[torch.Tensor, ClassCondition]:
    return torch.randint(V + 1, (B, N)), ClassCondition.of(torch.tensor([0, 2, 1]))


def test_shapes_and_ids() -> None:
    model, (tokens, condition) = build(), inputs()
    assert (model.num_sites, model.num_codes, model.mask_id, model.num_layers) == (N, V, V, 2)
    output = model.forward_with_taps(model.embed(tokens), condition, [1, 0])
    assert output.logits.shape == (B, N, V)
    assert [hidden.shape for hidden in output.hidden] == [(B, N, D)] * 2
    assert model.published_logits(model.embed(tokens), condition).shape == (B, N, V + 1)
    assert torch.equal(output.logits, model.published_logits(model.embed(tokens), condition)[..., :V])


def test_one_hot_and_masked_sites_are_hard_tokens() -> None:
    model, (tokens, _) = build(), inputs()
    masked = tokens == V
    soft = model.embed_soft(F.one_hot(tokens.masked_fill(masked, 0), V).float(), masked)
    assert torch.equal(soft, model.embed(tokens))
    assert torch.equal(model.embed_soft(torch.full((B, N, V), 1 / V), masked)[masked], model.embed(tokens)[masked])


def test_the_class_comes_in_and_labels_stay_as_they_are() -> None:
    model, (tokens, condition) = build(), inputs()
    x, labels = model.embed(tokens), condition.labels.clone()
    kept, dropped = model(x, condition), model(x, condition.drop())
    assert (kept - dropped).abs().amin(0).amax() > 1e-4
    assert torch.equal(model(x, ClassCondition.of(torch.zeros(B).long()).drop()), dropped)
    assert torch.equal(condition.labels, labels)


def test_dropout_is_off_unless_asked_for() -> None:
    model, (tokens, condition) = build().train(), inputs()
    x = model.embed(tokens)
    assert torch.equal(model(x, condition), model(x, condition))
    noisy = build(dropout=0.5).train()
    assert not torch.equal(noisy(x, condition), noisy(x, condition))


def test_checkpointed_activations_give_the_same_gradients() -> None:
    model, (tokens, condition) = build(), inputs()
    slim = build(checkpoint_activations=True)
    slim.load_state_dict(model.state_dict())
    for each in (model, slim):
        each(each.embed(tokens), condition).square().sum().backward()
    for one, other in zip(model.parameters(), slim.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_sizes_come_from_the_checkpoint(tmp_path: Path) -> None:
    model = build()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    opened = MaskGIT.from_checkpoint(tmp_path, heads=2, nclass=C)
    assert opened.config == model.config
    tokens, condition = inputs()
    assert torch.equal(opened(opened.embed(tokens), condition), model(model.embed(tokens), condition))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "model.heads: expected a divisor of the width 8, got 3"),
        ({"heads": 2, "img_size": 64}, "model.img_size: expected 32 as the checkpoint, got 64"),
        ({"heads": 2, "nclass": 1000}, "model.nclass: expected fewer than the 10 rows of the table, got 1000"),
    ],
)
def test_options_that_contradict_the_checkpoint(options: dict[str, int], message: str, tmp_path: Path) -> None:
    torch.save(build().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^model") as caught:
        MaskGIT.from_checkpoint(tmp_path, **{"nclass": C, **options})
    assert str(caught.value) == message


def test_ids_that_are_no_image_codes_are_refused() -> None:
    model = build()
    for token in (-1, V + 1):
        with pytest.raises(ValueError, match=rf"^tokens: expected ids in 0..{V}, got {token}$"):
            model.embed(torch.tensor([[token]]))


def test_published_counts() -> None:
    assert published_reveal_counts("arccos", num_sites=256, steps=8) == [1, 18, 26, 32, 38, 43, 48, 50]
    counts = [1, 26, 38, 46, 54, 61, 67, 73, 79, 84, 89, 94, 99, 104, 109]
    assert published_reveal_counts("arccos", num_sites=1024, steps=15) == counts
    with pytest.raises(ValueError, match=r"^steps: expected 2 to 256"):
        published_reveal_counts("arccos", num_sites=256, steps=1)


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize(("sites", "steps"), [(256, 256), (256, 129), (16, 16), (16, 9)])
def test_every_published_count_is_at_least_one(schedule: Schedule, sites: int, steps: int) -> None:
    counts = published_reveal_counts(schedule, num_sites=sites, steps=steps)
    assert min(counts) >= 1
    assert sum(counts) == sites


def test_the_sampler_reproduces_its_noise_and_fills_every_site() -> None:
    model, condition = build(), inputs()[1]
    sampler = PublishedMaskGITSampler(steps=3, guidance=2.0)
    tokens = sampler(model, condition, SampleRandom(0, range(B), device=torch.device("cpu")))
    assert tokens.shape == (B, N)
    assert int(tokens.max()) < V
    again = sampler(model, condition, SampleRandom(0, range(B), device=torch.device("cpu")))
    assert torch.equal(tokens, again)
    stored = [torch.rand(B, N) for _ in range(6)]
    assert sampler(model, condition, StoredNoise(stored)).shape == (B, N)
    with pytest.raises(ValueError, match="expected one more stored draw"):
        sampler(model, condition, StoredNoise(stored[:-1]))


def test_the_sampler_is_for_its_family_alone() -> None:
    model = ToyMaskedModel.random(num_classes=2, num_sites=4, num_codes=2)
    with pytest.raises(ValueError, match=r"^sampler: expected a MaskGIT model, got ToyMaskedModel$"):
        PublishedMaskGITSampler()(
            model, model.encode(torch.zeros(1).long()), SampleRandom(0, [0], device=torch.device("cpu"))
        )
