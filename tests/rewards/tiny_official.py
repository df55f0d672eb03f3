"""The official packages at the sizes of the parity fixtures, for the worker's path in test_official_packages.py."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

from rewards.official.hpsv3 import OfficialHPSv3
from rewards.official.imagereward import OfficialImageReward


class TinyImageReward(OfficialImageReward):
    """image-reward loads as ever; its vision tower, head, transforms and tokenizer have other sizes."""

    def __init__(self, checkpoint: str, **options: Any) -> None:
        from ImageReward.models.BLIP import blip_pretrain
        from ImageReward.models.BLIP.vit import VisionTransformer
        from transformers import PreTrainedTokenizerFast

        official = importlib.import_module("ImageReward.ImageReward")  # the package has a class of that name too

        sizes = json.loads((Path(checkpoint) / "sizes.json").read_text())
        vision, side = sizes["vit"], sizes["image_size"]
        mlp, transform = official.MLP, official._transform
        projections = official.BLIP_Pretrain

        def tower(*_: Any) -> tuple[Any, int]:
            settings = {name: vision[name] for name in ("patch_size", "embed_dim", "depth", "num_heads")}
            return VisionTransformer(img_size=side, **settings), vision["embed_dim"]

        blip_pretrain.create_vit = tower
        blip_pretrain.init_tokenizer = lambda: PreTrainedTokenizerFast(
            tokenizer_file=f"{checkpoint}/tokenizer.json", pad_token="[PAD]"
        )
        official.BLIP_Pretrain = lambda **given: projections(**given, embed_dim=sizes["embed_dim"])
        official.MLP = lambda _: mlp(sizes["med"]["hidden_size"])
        official._transform = lambda _: transform(side)
        super().__init__(checkpoint, **options)


class TinyHPSv3(OfficialHPSv3):
    """hpsv3 as it is: its sizes come from `base`."""

    def __init__(self, checkpoint: str, **options: Any) -> None:
        os.environ["TRANSFORMERS_OFFLINE"] = "1"
        super().__init__(checkpoint, **options)
