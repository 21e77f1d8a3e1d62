"""The four models of the digits family, from a linear map to a residual network.

All take float32 [n, 1, 32, 32] and return logits [n, 10]. The small ones spend their few operations at low resolution;
the residual network has few parameters too, its cost (hundreds of times that of the next) comes from working at full
resolution.
"""

from __future__ import annotations

from torch import Tensor, nn

from examples.digits.data import NUM_CLASSES, SIDE


def build_linear() -> nn.Module:
    """One linear map from pixels to logits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, NUM_CLASSES))


def build_mlp() -> nn.Module:
    """One hidden layer over the image at half resolution."""
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear((SIDE // 2) ** 2, 24),
        nn.ReLU(),
        nn.Linear(24, NUM_CLASSES),
    )


def build_cnn() -> nn.Module:
    """Two small convolutions at half and quarter resolution."""
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12 * (SIDE // 8) ** 2, NUM_CLASSES),
    )


class _Block(nn.Module):
    """Two convolutions beside a shortcut (He et al., 2016); the shortcut is 1 x 1 where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels_in, side, side] -> [n, channels, side / stride, side / stride]."""
        return self.activation(self.body(x) + self.shortcut(x))  # type: ignore[no-any-return]


def build_resnet() -> nn.Module:
    """Three stages of two residual blocks at 32, 16 and 8 pixels a side."""
    stem = [nn.Conv2d(1, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU()]
    shapes = [(48, 48, 1), (48, 48, 1), (48, 64, 2), (64, 64, 1), (64, 112, 2), (112, 112, 1)]
    stages = [_Block(channels_in, channels, stride) for channels_in, channels, stride in shapes]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(112, NUM_CLASSES))
