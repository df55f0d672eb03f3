"""The published samplers of Meissonic and MaskGen."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from softgen.categorical import StoredNoise
from softgen.models import MaskGen, Meissonic, TextCondition
from softgen.random import SampleRandom
from softgen.samplers import MaskGenSampler, MeissonicSampler, PublishedMaskGITSampler, published_sampler
from softgen.sampling import MaskGITSampler
from softgen.testing import ToyMaskedModel

B, N, K = 2, 4, 6


def meissonic(**changes: Any) -> Meissonic:
    sizes: dict[str, Any] = {"grid": [2, 2], "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8}
    sizes |= {"num_attention_heads": 1, "joint_attention_dim": 8, "axes_dims_rope": [4, 2, 2]}
    return Meissonic(**{**sizes, "vocab_size": 8, "codebook_size": K, **changes}).eval()


def maskgen() -> MaskGen:
    model = MaskGen(
        codebook_size=K,
        num_latent_tokens=N,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=1,
        text_embed_dim=8,
        micro_condition_embed_dim=4,
        condition_num_classes=1,
    )
    return model.eval()


def condition(batch: int = B) -> TextCondition:
    states = torch.randn(batch, 3, 8)
    return TextCondition.of(states, torch.ones(batch, 3, dtype=torch.bool), torch.randn(batch, 8))


def noise(seed: int = 0) -> SampleRandom:
    return SampleRandom(seed, range(B), device=torch.device("cpu"))


def test_published_settings() -> None:
    assert published_sampler(meissonic()) == MeissonicSampler(steps=64, guidance=9.0, confidence_noise=(2.0, 0.0))
    assert published_sampler(meissonic(downsample=False)) == MeissonicSampler(steps=48)
    expected = MaskGenSampler(
        steps=16, guidance=12.0, guidance_decay="cosine", randomize_temperature=2.0, aesthetic_score=6.5
    )
    assert published_sampler(maskgen()) == expected


def test_guidance_weights_are_the_published_ones() -> None:
    cosine = [MaskGenSampler().weight((step + 1) / 16) for step in range(16)]
    expected = [1.11, 1.42, 1.93, 2.61, 3.44, 4.40, 5.43, 6.50, 7.57, 8.60, 9.56, 10.39, 11.07, 11.58, 11.89, 12.0]
    assert cosine == pytest.approx(expected, abs=0.006)
    weights = {decay: MaskGenSampler(guidance=3.0, guidance_decay=decay).weight(0.5) for decay in ("linear", "none")}  # type: ignore[arg-type]
    assert weights == {"linear": 2.0, "none": 3.0}
    flipped = MaskGenSampler(guidance=3.0, guidance_decay="flippedcosine")
    assert flipped.weight(1.0) == pytest.approx(0.0)
    assert flipped.weight(0.0) == pytest.approx(2.0)


def test_masked_counts_are_the_published_ones() -> None:
    sampler, left, counts = MeissonicSampler(steps=8), 4096, []
    for step in range(8):
        left = sampler.masked_after(step, left, num_sites=4096)
        counts.append(left)
    assert counts == [4017, 3784, 3405, 2896, 2275, 1567, 799, 0]
    assert sampler.masked_after(3, 1, num_sites=4) == 1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("arccos", [3, 2, 1]), ("root", [2, 1, 1])],
)
def test_masks_that_a_schedule_leaves(schedule: Any, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = maskgen(), []
    predict = model.predict

    def watched(embeddings: torch.Tensor, *args: Any, **options: Any) -> Any:
        of_mask = model.embed(torch.tensor([[K]]))
        masks.append((embeddings == of_mask).all(-1).sum(-1).tolist())
        return predict(embeddings, *args, **options)

    monkeypatch.setattr(model, "predict", watched)
    MaskGenSampler(steps=4, schedule=schedule, guidance=0.0, guidance_decay="none")(model, condition(), noise())
    assert masks == [[count] * B for count in (N, *expected)]


@pytest.mark.parametrize("family", ["meissonic", "maskgen"])
def test_samples_are_those_of_their_noise(family: str) -> None:
    model: Any = meissonic() if family == "meissonic" else maskgen()
    sampler: Any = MeissonicSampler(steps=3) if family == "meissonic" else MaskGenSampler(steps=3)
    of = condition()
    with pytest.raises(ValueError, match=r"^guidance: expected .*, since this model has no null condition, got"):
        sampler(model, of, noise())
    off: Any = {"guidance": 1.0} if family == "meissonic" else {"guidance": 0.0, "guidance_decay": "none"}
    assert replace(sampler, **off)(model, of, noise()).shape == (B, N)
    model.store_negative(condition(1))
    tokens = sampler(model, of, noise())
    assert tokens.shape == (B, N)
    assert int(tokens.max()) < K
    assert torch.equal(tokens, sampler(model, of, noise()))
    others = [sampler(model, of, noise(seed)) for seed in range(1, 6)]
    assert any(not torch.equal(tokens, other) for other in others)
    draws = [torch.rand(B, N) for _ in range(5)]
    if family == "maskgen":
        draws = [torch.rand(B, *shape) for _ in range(3) for shape in ((N, K), (N,))]
    stored = StoredNoise(draws)
    assert sampler(model, of, stored).shape == (B, N)
    with pytest.raises(ValueError, match="expected one more stored draw"):
        stored.uniform(N)
    other = ToyMaskedModel.random(num_classes=2, num_sites=4, num_codes=2)
    with pytest.raises(ValueError, match=r"^sampler: expected a M.* model, got ToyMaskedModel$"):
        sampler(other, of, noise())


def test_the_model_is_told_how_many_steps_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = meissonic(), []
    predict = model.predict

    def watched(*args: Any, **options: Any) -> Any:
        told.append(options["timestep"])
        return predict(*args, **options)

    monkeypatch.setattr(model, "predict", watched)
    MeissonicSampler(steps=3, guidance=1.0)(model, condition(), noise())
    assert told == [2, 1, 0]


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (MeissonicSampler, {"steps": 0}, "steps: expected at least 1, got 0"),
        (MeissonicSampler, {"schedule": "arccos"}, "schedule: expected cosine or linear, got 'arccos'"),
        (MeissonicSampler, {"confidence_noise": (1.0,)}, "confidence_noise: expected two numbers of at least 0, got"),
        (MaskGenSampler, {"steps": 0}, "steps: expected at least 1, got 0"),
        (MaskGenSampler, {"schedule": "x"}, "schedule: expected one of linear, square, cosine, arccos, root, got 'x'"),
        (PublishedMaskGITSampler, {"steps": 1}, "steps: expected at least 2, got 1"),
        (PublishedMaskGITSampler, {"schedule": "x"}, "schedule: expected one of linear, square, cosine, arccos, root"),
        (PublishedMaskGITSampler, {"temperature": math.nan}, "temperature: expected a finite number of at least 0"),
        (PublishedMaskGITSampler, {"confidence_noise": -3.0}, "confidence_noise: expected a finite number of at least"),
        (PublishedMaskGITSampler, {"guidance": -1.0}, "guidance: expected a finite number of at least 0, got -1.0"),
        (MaskGITSampler, {"confidence_noise": math.nan}, "confidence_noise: expected a finite number of at least 0"),
        (MaskGenSampler, {"guidance": -1.0}, "guidance: expected a finite number of at least 0, got -1.0"),
        (MaskGenSampler, {"guidance_power": 0.0}, "guidance_power: expected a finite number above 0, got 0.0"),
        (
            MaskGenSampler,
            {"guidance_decay": "x"},
            "guidance_decay: expected one of cosine, flippedcosine, linear, none",
        ),
    ],
)
def test_bad_settings(cls: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        cls(**changes)
    assert str(caught.value).startswith(message)
