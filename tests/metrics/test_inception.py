"""The FID of the papers: against torch-fidelity, on random weights of the published names and shapes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from softgen.data.base import ImageDataModule, TrainVal
from softgen.evaluate import main as evaluate
from softgen.images import to_uint8
from softgen.metrics import FeatureStatistics, entropy_score, extract_features, precision_recall
from softgen.metrics.inception import InceptionFeatures
from softgen.metrics.protocol import adm_protocol
from softgen.models import MaskGIT
from softgen.tokenizers import TamingVQGAN


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as pytorch-fid's: torch-fidelity's own names, with values that keep the signal through all layers."""
    reference = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        named = reference.FeatureExtractorInceptionV3("toy", ["2048"]).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in named.items():
        if name.endswith("num_batches_tracked"):
            continue
        if value.ndim > 1:
            fan_in = value[0].numel()
            state[name] = torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif name.endswith("running_var") or name.endswith("weight"):
            state[name] = torch.rand(value.shape, generator=generator) + 0.5
        else:
            state[name] = 0.1 * torch.randn(value.shape, generator=generator)
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def extractor(weights: Path) -> InceptionFeatures:
    return InceptionFeatures(weights)


def _smooth(n: int, size: tuple[int, int], *, seed: int) -> Tensor:
    small = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, size=size, mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("size", [(32, 299), (340, 310)])
def test_features_and_logits_are_torch_fidelitys(
    size: tuple[int, int], extractor: InceptionFeatures, weights: Path
) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    reference = FeatureExtractorInceptionV3(
        "toy", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    images = _smooth(1, size, seed=1)
    features, logits = reference(to_uint8(images))
    seen = extractor.features_and_logits(images)
    assert features.std() > 0.01
    for ours, theirs in ((seen.features, features), (seen.logits, logits)):
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_torchvisions_own_network_is_another(extractor: InceptionFeatures, weights: Path) -> None:
    from torchvision.models.inception import Inception3

    plain = Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    plain.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    plain.fc = torch.nn.Identity()
    levels = to_uint8(_smooth(1, (299, 299), seed=2)).float()
    with torch.no_grad():
        theirs = plain((levels - 128) / 128)
    ours = extractor.features(levels / 255)
    assert float((ours - theirs).abs().max()) > 0.05 * float(ours.abs().max())


def test_it_is_frozen(extractor: InceptionFeatures) -> None:
    assert not extractor.train().training
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_bad_weights_are_refused(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^inception_weights: .*does not exist"):
        InceptionFeatures(tmp_path / "none.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"^inception_weights: expected the tensors of this model, got \d+ missing"):
        InceptionFeatures(tmp_path / "other.pth")

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(ValueError, match=r"^inception_weights: expected a file, since https.* \(no route to host\)$"):
        InceptionFeatures()


def _between_means(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The first term of the Frechet distance: the others take seconds at 2,048 features, and have their own tests."""
    return float((a.mean - b.mean).square().sum())


def test_a_reference_as_adm_publishes_it(
    tmp_path: Path, extractor: InceptionFeatures, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["softgen.metrics.image_quality"], "frechet_distance", _between_means)
    real, fake = _smooth(5, (24, 24), seed=3), _smooth(5, (24, 24), seed=4)
    features = extract_features(real, extractor=extractor).features
    known = FeatureStatistics.from_features(features)
    path = tmp_path / "reference.npz"
    np.savez(path, mu=known.mean.numpy(), sigma=known.covariance.numpy(), arr_0=to_uint8(real).permute(0, 2, 3, 1))
    protocol = adm_protocol(statistics=path, weights=weights)
    quality = protocol.score([fake[:2], fake[2:]], torch.zeros(5, dtype=torch.int64))
    seen = extract_features(fake, extractor=extractor)
    assert seen.logits is not None
    assert protocol.name(50_000) == "fid_adm_50k"
    expected = _between_means(FeatureStatistics.from_features(seen.features), known)
    assert expected > 0
    assert quality.fd == pytest.approx(expected, rel=1e-4)
    assert quality.accuracy is None  # its classes are not those of the images
    assert quality.entropy_score == pytest.approx(entropy_score(seen.logits))
    pr = precision_recall(features, seen.features, k=3)
    assert (quality.precision, quality.recall) == (pr.precision, pr.recall)
    assert protocol.facts["inception"] == extractor.fingerprint
    assert protocol.facts["statistics"] == known.fingerprint()

    np.savez(path, mu=known.mean.numpy(), sigma=known.covariance.numpy())
    assert adm_protocol(statistics=path, weights=weights).reference_features is None


class _Few(ImageDataModule):
    image_size, num_classes = 24, 0

    def load_sources(self) -> TrainVal:
        return TrainVal(train=_Source(), val=_Source())


class _Source:
    def __len__(self) -> int:
        return 4

    def fetch(self, indices: range) -> dict[str, Tensor]:
        return {"image": _smooth(4, (24, 24), seed=5)[list(indices)]}


def test_a_reference_from_images(extractor: InceptionFeatures, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["softgen.metrics.image_quality"], "frechet_distance", _between_means)
    protocol = adm_protocol(data=_Few(), weights=weights)
    features = extract_features(_smooth(4, (24, 24), seed=5), extractor=extractor).features
    assert protocol.reference.fingerprint() == FeatureStatistics.from_features(features).fingerprint()
    assert protocol.score(_smooth(4, (24, 24), seed=5)).fd == pytest.approx(0, abs=1e-3)


def test_bad_references_are_refused(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(ValueError, match=r"^statistics: .* one of them, got neither$"):
        adm_protocol(weights=weights)
    with pytest.raises(ValueError, match=r"^statistics: .* one of them, got both$"):
        adm_protocol(statistics="x.npz", data=_Few(), weights=weights)
    path = tmp_path / "reference.npz"
    with pytest.raises(ValueError, match=r"^statistics: expected a file of feature statistics, got .*reference.npz"):
        adm_protocol(statistics=path, weights=weights)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"^statistics: expected a file of feature statistics, got .*reference.npz"):
        adm_protocol(statistics=path, weights=weights)
    np.savez(path, mu=np.zeros(4), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"^statistics: expected a mean \(D,\) .* got \(4,\) and \(3, 3\)$"):
        adm_protocol(statistics=path, weights=weights)
    np.savez(path, mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match=r"^statistics: expected finite numbers"):
        adm_protocol(statistics=path, weights=weights)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"^statistics: expected those of 2048 features .* got 3$"):
        adm_protocol(statistics=path, weights=weights)
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048), arr_0=np.zeros((2, 3, 8, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"^statistics: expected images \(n, H, W, 3\) of uint8"):
        adm_protocol(statistics=path, weights=weights)
    np.savez(path, mu=np.array([object()] * 3), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"^statistics: expected a file of feature statistics"):
        adm_protocol(statistics=path, weights=weights)


def test_the_command(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["softgen.metrics.image_quality"], "frechet_distance", _between_means)
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    sizes = {"hidden_dim": 8, "depth": 1, "heads": 2, "mlp_dim": 8, "nclass": 3}
    tokenizer = TamingVQGAN(
        image_size=64, n_embed=5, embed_dim=4, ch=32, ch_mult=[1, 1, 1, 1, 1], num_res_blocks=1, z_channels=4
    )
    model = MaskGIT(img_size=64, codebook_size=5, **sizes)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    words = [f"--model={tmp_path / 'model'}", "--extractor=inception", f"--statistics={tmp_path / 'reference.npz'}"]
    words += [f"--inception_weights={weights}", "--n=3", "--batch_size=2", f"--out={tmp_path / 'scores.json'}"]
    with pytest.warns(UserWarning, match=r"^n: a published FID is over 50,000 images, this one over 3: "):
        evaluate([*words, "--sampler=published", "--device=cpu"])
    assert "fid_adm_3" in capsys.readouterr().out
    written = json.loads((tmp_path / "scores.json").read_text())
    (row,) = written["rows"]
    assert (row["name"], row["protocol"], row["n"], row["accuracy"]) == ("published", "fid_adm_3", 3, None)
    assert row["fd"] > 0
    assert row["precision"] is None
    assert written["sampler"].startswith("PublishedMaskGITSampler(steps=8, ")
    assert len(written["statistics"]) == len(written["inception"]) == 16
    with pytest.raises(SystemExit):
        evaluate([*words, "--sampler=published", "--guidance=3", "--device=cpu"])
    assert "guidance: expected none with sampler published" in capsys.readouterr().err
    digits = ["--data=softgen.data.Digits", "--device=cpu"]
    with pytest.raises(SystemExit):
        evaluate([words[0], words[1], *digits])
    assert "data: expected 3 classes as the model has, got 10" in capsys.readouterr().err
