"""Stand-ins for the official packages, with the calls that are made to them, for the worker's path."""

from pathlib import Path

IMAGEREWARD = """
import torch
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

class Blip:
    def tokenizer(self, prompts, *, padding, truncation, max_length, return_tensors):
        assert (padding, truncation, max_length, return_tensors) == ("max_length", True, 35, "pt")
        mask = torch.zeros(len(prompts), 35, dtype=torch.long)
        for row, prompt in zip(mask, prompts):
            row[: len(prompt.split())] = 1
        return {"input_ids": 3 * mask, "attention_mask": mask}

class Model(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.blip = Blip()
        self.preprocess = Compose([Resize(8), CenterCrop(8), lambda image: 1 / 0, ToTensor(), Normalize(0.5, 0.25)])

    def score_gard(self, ids, mask, pixels):
        assert pixels.shape[1:] == (3, 8, 8)
        return (pixels * self.weight).mean(dim=(1, 2, 3))[:, None] * mask.sum(dim=1, keepdim=True)

def load(name, device, med_config):
    print("load checkpoint from", name)
    assert open(med_config).read() == "{}"
    return Model(torch.load(name)["weight"]).to(device)
"""
HPSV3 = """
import safetensors.torch, torch, yaml

class HPSv3RewardInferencer:
    def __init__(self, config_path, checkpoint_path, device, differentiable):
        assert differentiable
        settings = yaml.safe_load(open(config_path))
        assert settings["model_name_or_path"] == "a/base" and settings["bf16"] is False and settings["kept"] == 3
        self.model = torch.nn.Linear(1, 1)
        self.model.weight.data.fill_(safetensors.torch.load_file(checkpoint_path)["weight"].item())

    def reward(self, images, prompts):
        (image,), (prompt,) = images, prompts
        assert image.ndim == 3 and 1 < image.detach().max() <= 255
        mean = image.mean() / 255 * len(prompt) * self.model.weight[0, 0]
        return torch.stack([mean, 0 * mean])[None]
"""


def write_fake_packages(folder: Path) -> None:
    """Both packages as folders, for PYTHONPATH."""
    for name, text in (("ImageReward", IMAGEREWARD), ("hpsv3", HPSV3)):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(text)
    (folder / "hpsv3" / "config").mkdir()
    (folder / "hpsv3" / "config" / "HPSv3_7B.yaml").write_text("model_name_or_path: theirs\nbf16: true\nkept: 3\n")
