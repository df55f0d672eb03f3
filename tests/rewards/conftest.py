import json
from pathlib import Path

import pytest
import torch

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a CLIP architecture of 1.6 million weights, nearly all of them its vocabulary."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    return "tiny-clip"


@pytest.fixture(scope="session")
def clip_weights(tiny_clip: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights for it, with a logit scale of e^2."""
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        weights = open_clip.create_model(tiny_clip).state_dict()
    weights["logit_scale"] = torch.tensor(2.0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(weights, path)
    return path
