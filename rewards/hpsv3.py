"""Human Preference Score v3 (arXiv 2508.03789) on transformers' Qwen2-VL, with a gradient."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards.backend import Backend, is_official, open_official
from rewards.base import Reward
from rewards.checkpoints import load_checked, part_of, read_checkpoint
from rewards.compute import Compute
from rewards.errors import one_line
from rewards.heads import WideHead
from rewards.qwen_images import MERGE, patch_rows
from rewards.transformers_clip import LazyTokenizer, import_transformers

_INSTRUCTION = Path(__file__).parent / "hpsv3_instruction.txt"
_REWARD = "<|Reward|>"
_PIXELS = 256 * 28 * 28
_REWARD_ID, _PAD_ID = 151657, 151643
_OFFICIAL = "rewards.official.hpsv3.OfficialHPSv3"
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_FILES = ("HPSv3.safetensors", "model.safetensors")


class HPSv3Reward(Reward):
    """The mean of the score that a Qwen2-VL-7B with a head of three layers predicts; about -5 to 15.

    The checkpoint is `HPSv3.safetensors` of `MizzenAI/HPSv3` (Apache-2.0 licence), 7.7 G parameters, 14.4 GiB in
    bfloat16. Its instruction, in hpsv3_instruction.txt, is quoted from the package hpsv3 (MIT licence, the HPSv3
    authors). Positions are sequential, as in the official model, and not Qwen2-VL's grid. The head works in float32.

    Args:
        checkpoint: The file, or a folder or hub id that holds it.
        base: Folder or hub id of Qwen2-VL, whose settings and tokenizer are used.
        config: Settings of `Qwen2VLConfig`; by default those of `base`. The number of rows of the vocabulary is read
            from the checkpoint.
        pixels: Pixels that every image is brought to, about; 448 x 448 for a square one.
        reward_token_id: Id of `<|Reward|>`, the token that the score is read at; the default is the one
            after Qwen2-VL's own tokens.
        pad_token_id: Id that shorter texts are padded with.
        class_names: Prompts that stand for class labels.
        backend: "official" has the package hpsv3 compute, in a process and an environment of its own (`python -m
            rewards env hpsv3`), on the CPU unless `compute.device` says otherwise.
        python: For "official": the interpreter of another environment that has the package.
        compute: Precision, micro-batches, recomputed activations and device.
        name: Name in logs and errors.

    Raises:
        ImportError: transformers is not installed; the message has the command.
        ValueError: The checkpoint or the tokenizer cannot be opened, or does not fit; for "official", there is no such
            environment, it lacks the package, or its process dies.
    """

    def __init__(
        self,
        checkpoint: str | Path = "MizzenAI/HPSv3",
        *,
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        config: Mapping[str, Any] | None = None,
        pixels: int = _PIXELS,
        reward_token_id: int = _REWARD_ID,
        pad_token_id: int = _PAD_ID,
        class_names: Sequence[str] | None = None,
        backend: Backend = "native",
        python: str | Path | None = None,
        compute: Compute = Compute(),  # noqa: B008 - frozen
        name: str = "hpsv3",
    ) -> None:
        super().__init__(name=name, class_names=class_names, compute=compute)
        self.official: Reward | None = None
        if is_official(backend, python=python):
            self.official = open_official(
                _OFFICIAL,
                environment="hpsv3",
                python=python,
                options={"checkpoint": str(checkpoint), "base": base},
                unread={
                    "config": config is not None,
                    "pixels": pixels != _PIXELS,
                    "reward_token_id": reward_token_id != _REWARD_ID,
                    "pad_token_id": pad_token_id != _PAD_ID,
                },
                compute=compute,
                name=name,
            )
            return
        self.pixels, self.reward_token_id, self.pad_token_id = pixels, reward_token_id, pad_token_id
        self._open(checkpoint, base=base, config=config)

    def _open(self, checkpoint: str | Path, *, base: str, config: Mapping[str, Any] | None) -> None:
        transformers = import_transformers()
        state = read_checkpoint(checkpoint, key="checkpoint", names=_FILES)
        if "rm_head.0.weight" not in state or "model.embed_tokens.weight" not in state:
            raise ValueError("checkpoint: expected one of HPSv3 with 'rm_head.*' and 'model.*', got none")
        rows = state["model.embed_tokens.weight"].shape[0]
        if config is None:
            try:
                settings = transformers.Qwen2VLConfig.from_pretrained(base)
            except Exception as error:  # transformers and the hub each have errors of their own
                raise ValueError(f"base: expected Qwen2-VL, got {base!r} ({one_line(error)})") from error
        else:
            settings = transformers.Qwen2VLConfig(**dict(config))
        settings.get_text_config().vocab_size = rows
        with torch.device("meta"):
            model = transformers.Qwen2VLModel(settings)
        renamed = {f"visual.{key}": value for key, value in part_of(state, "visual.").items()}
        renamed |= {f"language_model.{key}": value for key, value in part_of(state, "model.").items()}
        self.model: Any = _loaded(model, renamed, transformers.Qwen2VLModel, settings, dtype=self.compute.torch_dtype)
        width = state["rm_head.0.weight"].shape[1]
        self.rm_head = WideHead(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )
        load_checked(self.rm_head, part_of(state, "rm_head."), key="checkpoint (rm_head)")
        self._tokenizer = LazyTokenizer(base)
        self.settle()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], in float32 or better."""
        if self.official is not None:
            return self.official(images, prompts)
        rows, grids = patch_rows(images, least=self.pixels, most=self.pixels)
        tokens = len(rows) // len(images) // MERGE**2
        ids, mask = self.tokens(prompts, image_tokens=tokens)
        self._check_asked(ids)
        return self.score(rows, grids, ids.to(images.device), mask.to(images.device))[:, 0]

    def tokens(self, prompts: Sequence[str], *, image_tokens: int) -> tuple[Tensor, Tensor]:
        """Token ids and their mask, (B, L) each, padded on the right, with places for an image's tokens."""
        tokenizer = self._tokenizer.open()
        if _REWARD not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [_REWARD]})
        instruction = _INSTRUCTION.read_text(encoding="utf-8")
        image = f"<|vision_start|>{'<|image_pad|>' * image_tokens}<|vision_end|>"
        texts = [
            f"{_SYSTEM}{image}{instruction.replace('{text_prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
            for prompt in prompts
        ]
        rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()

    def score(self, rows: Tensor, grids: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean and spread parameter (B, 2) from patch rows, their grids (B, 3), token ids (B, L) and their mask.

        Each text has one reward token.
        """
        asked = ids == self.reward_token_id
        weights = next(self.model.language_model.parameters())
        seen = self.model.visual(rows.to(weights.dtype), grid_thw=grids)
        embedded = self.model.language_model.embed_tokens(ids)
        image = (ids == self.model.config.image_token_id).unsqueeze(-1)
        pooled = seen if isinstance(seen, Tensor) else seen.pooler_output
        embedded = embedded.masked_scatter(image, pooled.to(embedded.dtype))
        # No cache of keys: layers that are run again in the backward pass would append to it.
        out_states = self.model.language_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
        out: Tensor = self.rm_head(out_states.last_hidden_state[asked])
        return out

    def _check_asked(self, ids: Tensor) -> None:
        """Refuse texts (B, L), while still on the CPU, that have no reward token, or more than one."""
        if not bool(((ids == self.reward_token_id).sum(dim=1) == 1).all()):
            raise ValueError(
                f"reward {self.name}: expected one token {self.reward_token_id} (reward_token_id) a text, "
                "got another count"
            )


def _loaded(model: Any, state: Mapping[str, Tensor], cls: Any, settings: Any, *, dtype: torch.dtype) -> Any:
    """The backbone with its weights in `dtype`, in memory once; buffers outside the checkpoint are computed."""
    state = {key: value.to(dtype) for key, value in state.items()}
    expected = model.state_dict()
    problems = [f"{name!r} missing" for name in expected if name not in state][:1]
    problems += [f"{name!r} unexpected" for name in state if name not in expected][:1]
    problems += [
        f"{name!r} of shape {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ][:1]
    if problems:
        raise ValueError(f"checkpoint: expected the weights of this Qwen2-VL, got {', '.join(problems)}")
    model.load_state_dict(state, assign=True)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner = model.get_submodule(name.rpartition(".")[0])
            _restore_buffers(owner)
    return model


def _restore_buffers(module: Any) -> None:
    """Rotary frequencies of transformers' modules, which are in no checkpoint."""
    fresh = type(module)(module.config) if hasattr(module, "config") else type(module)(module.dim, module.theta)
    for name, buffer in fresh.named_buffers(recurse=False):
        setattr(module, name, buffer)
    if hasattr(fresh, "original_inv_freq"):
        module.original_inv_freq = fresh.original_inv_freq
