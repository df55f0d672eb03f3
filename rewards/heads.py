"""The score heads that published rewards share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_DROPOUTS = {1: 0.2, 3: 0.2, 5: 0.1}


class WideHead(nn.Sequential):
    """Layers that compute in float32 at least, whatever their weights are kept in, under autocast too."""

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, width) to what the last layer gives."""
        x = features.to(torch.promote_types(features.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            for layer in self:
                if isinstance(layer, nn.Linear):
                    x = F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
                else:
                    x = layer(x)
        return x


class LinearStack(nn.Module):
    """Linear layers to 1024, 128, 64, 16 and 1 numbers, without activations; the odd places are dropouts of training.

    Args:
        width: Numbers that come in.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
        self.layers = WideHead(
            *(nn.Linear(*sizes[index]) if index in sizes else nn.Dropout(_DROPOUTS[index]) for index in range(8))
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, width) to (B, 1), in float32 or better."""
        out: Tensor = self.layers(features)
        return out
