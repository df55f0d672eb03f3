"""A small classifier, trained here in seconds: an extractor for data that Inception was never meant for."""

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from softgen.metrics.features import FeatureExtractor, ImageFeatures
from softgen.pretrained import Pretrained


class SmallClassifier(FeatureExtractor, Pretrained):
    """Three convolutions, 64 features, a linear head.

    Args:
        name: Name of the extractor, part of each metric's name, such as "digitsnet".
        image_size: Height and width of the images in pixels, at least 4. From 16 on the first convolution has
            stride 2.
        num_classes: Number of classes C.
        width: Channels of the first convolution; the others have twice as many.

    Raises:
        ValueError: An argument is out of range.
    """

    feature_dim = 64

    def __init__(self, *, name: str, image_size: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        if image_size < 4:
            raise ValueError(f"image_size: expected at least 4, got {image_size}")
        if num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
        if width < 1:
            raise ValueError(f"width: expected at least 1, got {width}")
        self.config = {"name": name, "image_size": image_size, "num_classes": num_classes, "width": width}
        self.name = name
        self.image_size = image_size
        self.num_classes: int = num_classes
        stride = 2 if image_size >= 16 else 1
        self.body = nn.Sequential(
            *_convolution(3, width, kernel_size=2 * stride + 1, stride=stride),
            *_convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *_convolution(2 * width, 2 * width),
            nn.Flatten(),
        )
        side = ((image_size - 1) // stride + 1) // 2
        self.neck = nn.Linear(2 * width * side * side, self.feature_dim)
        self.head = nn.Linear(self.feature_dim, num_classes)

    def features_and_logits(self, images: Tensor) -> ImageFeatures:
        """Features (B, 64), which are ReLU outputs and so not negative, and logits (B, C).

        Args:
            images: (B, 3, image_size, image_size) in [0, 1].

        Raises:
            ValueError: The images have another shape.
        """
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"images: expected (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
        features = F.relu(self.neck(self.body(2 * images.to(self.neck.weight.dtype) - 1)))
        return ImageFeatures(features=features, logits=self.head(features))

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder, all of it or nothing."""
        self.save_pretrained(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "SmallClassifier":
        """Read what `save` wrote; the result is in eval mode.

        Raises:
            ValueError: The folder is missing or does not hold a saved classifier.
        """
        if not Path(folder).is_dir():
            raise ValueError(f"classifier: expected the folder of a saved classifier, got '{folder}'")
        return cls.from_pretrained(folder, key="classifier")


def _convolution(channels_in: int, channels_out: int, *, kernel_size: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]
