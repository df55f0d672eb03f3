"""The official packages in environments of their own, against this package: the same scores and gradients.

Each environment is made where `python -m rewards env` makes it, unless it is there: minutes, and gigabytes.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import _tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from rewards import HPSv3Reward, ImageRewardReward, Reward, hpsv3, imagereward
from rewards.environments import make_environment
from rewards.isolated import Isolated

HERE = Path(__file__).parent
GOLDEN = Path(os.environ.get("SOFTGEN_GOLDEN", HERE.parents[2] / "shared" / "golden"))
PROMPTS = ["a red cat", "photo of two blue dog"]
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for message in messages %}<|im_start|>"
    "{{ message['role'] }}\n{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)

pytestmark = pytest.mark.slow


def _fixture(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = GOLDEN / f"{name}_a"
    if not folder.is_dir():
        pytest.skip(f"the fixture {folder} is not here")
    return json.loads((folder / "config.json").read_text()), load_file(folder / "state_dict.safetensors")


def _compare(native: Reward, official: Reward, images: Tensor) -> None:
    results = []
    for reward in (native, official):
        leaf = images.clone().requires_grad_()
        scores = reward(leaf, PROMPTS)
        (gradient,) = torch.autograd.grad((scores * torch.tensor([1.0, -2.0])).sum(), leaf)
        results.append((scores.detach(), gradient))
    (scores, gradient), (theirs, their_gradient) = results
    apart = (scores - theirs).abs().max()
    slope, slope_apart = their_gradient.abs().max(), (gradient - their_gradient).abs().max()
    print(f"{native.name}: {scores.tolist()} against {theirs.tolist()}, {apart:.2g} apart, ", end="")
    print(f"gradients {slope_apart:.2g} apart of at most {slope:.2g}")
    assert scores[0] != scores[1]
    torch.testing.assert_close(scores, theirs, rtol=1e-5, atol=1e-5)
    assert slope > 0
    assert slope_apart < 1e-4 * slope


def test_imagereward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = _fixture("imagereward")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    _tokenizer(tmp_path, special=names, unknown="[UNK]", template="[CLS] $A [SEP]", pad_token="[PAD]")
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(config["args"]["med"]))
    (tmp_path / "sizes.json").write_text(json.dumps(config["args"]))
    native = ImageRewardReward(tmp_path, tokenizer=str(tmp_path), vision_heads=config["args"]["vit"]["num_heads"])

    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr(imagereward, "_OFFICIAL", "tiny_official.TinyImageReward")
    python = make_environment("imagereward").python
    official = ImageRewardReward(tmp_path, backend="official", python=python)
    # Nothing that bicubic interpolation overshoots, which the native reward clips as PIL does.
    images = 0.3 + 0.4 * torch.rand(2, 3, 96, 80, generator=torch.Generator().manual_seed(0))
    _compare(native, official, images)
    assert isinstance(official.official, Isolated)
    official.official.close()


def _qwen(folder: Path, *, args: dict[str, Any], state: dict[str, Tensor]) -> int:
    """Qwen2-VL as the official package opens it, in folder/base; its tokenizer for the native reward in folder/words.

    Returns:
        The id that `<|Reward|>` will have: as with the published checkpoint, that of the last row.
    """
    special = {96: "<|endoftext|>", 98: "<|vision_start|>", 99: "<|vision_end|>", 100: "<|image_pad|>"}
    special |= {101: "<|video_pad|>", 102: "<|im_start|>", 103: "<|im_end|>"}
    words = [
        "<unk>",
        *[
            "a",
            "red",
            "blue",
            "cat",
            "dog",
            "of",
            "photo",
            "two",
            "image",
            "prompt",
            "Please",
            "provide",
            "the",
            "overall",
            "quality",
        ],
    ]
    count = 110
    vocabulary = {special.get(i, words[i] if i < len(words) else f"word{i}"): i for i in range(count)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=list(special.values())
    )
    fast.save_pretrained(folder / "words")
    base = folder / "base"
    base.mkdir()
    (base / "tokenizer.json").write_bytes((folder / "words" / "tokenizer.json").read_bytes())
    (base / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>"})
    )
    (base / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (base / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"})
    )
    (base / "config.json").write_text(json.dumps({**args, "model_type": "qwen2_vl", "vocab_size": count + 1}))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][: count + 1].clone()
    save_file(state, folder / "HPSv3.safetensors")
    backbone = {name: value for name, value in state.items() if not name.startswith("rm_head.")}
    save_file(backbone, base / "model.safetensors", metadata={"format": "pt"})
    return count


def test_hpsv3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = _fixture("hpsv3_qwen2vl")
    args = {**config["args"], "max_position_embeddings": 2048}
    reward_id = _qwen(tmp_path, args=args, state=state)
    native = HPSv3Reward(
        tmp_path, base=str(tmp_path / "words"), config=args, reward_token_id=reward_id, pad_token_id=96
    )

    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr(hpsv3, "_OFFICIAL", "tiny_official.TinyHPSv3")
    python = make_environment("hpsv3").python
    official = HPSv3Reward(tmp_path, base=str(tmp_path / "base"), backend="official", python=python)
    images = torch.rand(2, 3, 120, 96, generator=torch.Generator().manual_seed(0))
    _compare(native, official, images)
    assert isinstance(official.official, Isolated)
    official.official.close()
