"""The score heads that published rewards share."""

from torch import Tensor, nn

_DROPOUTS = {1: 0.2, 3: 0.2, 5: 0.1}


class LinearStack(nn.Module):
    """Linear layers to 1024, 128, 64, 16 and 1 numbers, without activations; the odd places are dropouts of training.

    Args:
        width: Numbers that come in.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
        self.layers = nn.Sequential(
            *(nn.Linear(*sizes[index]) if index in sizes else nn.Dropout(_DROPOUTS[index]) for index in range(8))
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, width) to (B, 1)."""
        out: Tensor = self.layers(features)
        return out
