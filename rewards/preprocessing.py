"""What a pretrained image tower wants its pixels to be, on tensors and differentiable."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_HALF_LEVEL = 0.5 / 255
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def normalised(images: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images - mean) / std, a number for each channel of images (B, C, H, W).

    Channel by channel: a tensor of numbers would have to be brought to the device, and the processor to wait for it.
    """
    channels = zip(images.unbind(1), mean, std, strict=True)
    return torch.stack([(channel - shift) / scale for channel, shift, scale in channels], dim=1)


@dataclass(frozen=True)
class Preprocessing:
    """Antialiased resize, centre crop, and the model's own mean and std.

    The sizes follow torchvision's rules, and the values the usual PIL pipeline, which filters rows, then columns, and
    after each clips to [0, 1] what bicubic interpolation overshoots at edges (new releases of Pillow take some images
    that are not square by columns first, which shows at hard edges). PIL also rounds to 8 bits each time; here nothing
    is rounded, so that the gradient is exact. The clipping leaves half an 8-bit level on either side, which rounds to
    the same: flat black and white areas keep their gradient.

    Attributes:
        size: Height and width of the result in pixels.
        mean: Of each channel, subtracted.
        std: Of each channel, divided by.
        interpolation: The filter.
        resize_mode: "shortest" scales the shorter edge to the size and cuts out the centre; "squash" scales both edges
            and keeps no aspect ratio; "longest" scales the longer edge to the size and pads the shorter one with black.
        crop: Where the centre of an odd margin lies: "round" as torchvision has it, "floor" as transformers.
        clip: Whether that is done; not by a pipeline that resizes tensors.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash", "longest"] = "shortest"
    crop: Literal["round", "floor"] = "round"
    clip: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to (B, 3, *size), normalised, in float32 or better."""
        from torchvision.transforms import InterpolationMode, functional

        images = images.to(torch.promote_types(images.dtype, torch.float32))
        height, width = self._resized(images.shape[-2], images.shape[-1])
        for size in ([images.shape[-2], width], [height, width]) if self.clip else ([height, width],):
            images = functional.resize(images, size, InterpolationMode(self.interpolation), antialias=True)
            if self.clip:
                images = images.clamp(-_HALF_LEVEL, 1 + _HALF_LEVEL)
        if self.resize_mode == "longest":
            spare_height, spare_width = self.size[0] - height, self.size[1] - width
            top, left = spare_height // 2, spare_width // 2
            images = functional.pad(images, [left, top, spare_width - left, spare_height - top])
        elif self.resize_mode == "shortest" and self.crop == "floor":
            top, left = (height - self.size[0]) // 2, (width - self.size[1]) // 2
            images = images[..., top : top + self.size[0], left : left + self.size[1]]
        elif self.resize_mode == "shortest":
            images = functional.center_crop(images, list(self.size))
        return normalised(images, mean=self.mean, std=self.std)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, before the crop."""
        target_height, target_width = self.size
        if self.resize_mode == "squash":
            return target_height, target_width
        if self.resize_mode == "longest":
            scale = min(target_height / height, target_width / width)
            return round(height * scale), round(width * scale)
        if target_height == target_width:
            side, short = target_height, min(height, width)
            return int(side * height / short), int(side * width / short)
        ratio = min(height / target_height, width / target_width)
        return round(height / ratio), round(width / ratio)
