"""Every family that can be checked: its name in config.json, and the module that checks it."""

import importlib

from tests.parity.fixture import Family

_MODULES: dict[str, str] = {
    "hpsv3_qwen2vl": "hpsv3",
    "qwen2vl_imgproc": "hpsv3",
    "hpsv2": "reward_models",
    "imagereward": "reward_models",
    "laion_aesthetic": "reward_models",
    "pickscore_clip": "reward_models",
    "imagebert": "titok_generators",
    "uvitbert": "titok_generators",
    "sftok": "sftok",
    "softvq_model": "softvq",
    "softvq_quantizer": "softvq",
    "maskgit": "maskgit",
    "maskgit_vqgan": "titok",
    "titok": "titok",
    "titok_direct": "titok",
    "maskbit": "maskbit",
    "meissonic": "meissonic",
    "maskgen_vq": "maskgen",
    "tatitok": "maskgen",
    "cliptext": "text_towers",
}


def names() -> list[str]:
    """The families that can be checked."""
    return sorted(_MODULES)


def find_family(name: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in _MODULES:
        raise ValueError(f"family: expected one of {', '.join(names())}, got {name!r}")
    family = importlib.import_module(f"tests.parity.{_MODULES[name]}").FAMILIES[name]
    assert isinstance(family, Family)
    return family
