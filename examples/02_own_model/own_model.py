"""A model and a data set of your own in a recipe, by import path.

    PYTHONPATH=examples/02_own_model sparing train examples/02_own_model/own_model.yaml

The functions are ordinary Python. `sparing train` calls them with the keys of the recipe's sections `model` and `data`.
"""

import torch
from torch import Tensor, nn

from sparing.data import ImageData, Images

SHAPES = ("horizontal", "vertical", "diagonal", "checkered")
"""The classes of `stripes`."""


class SmallNet(nn.Module):
    """Two convolutions and a Linear.

    Args:
        num_classes: number of classes; follows from the data.
        in_channels: number of image channels; follows from the data.
        width: output channels of the convolutions.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc(x.mean(dim=(2, 3)))


def stripes(count: int = 600, size: int = 12, noise: float = 0.3) -> ImageData:
    """Return images of stripes in noise, one class per direction. A real data set would be read from files here.

    Args:
        count: number of images; a sixth each is for validation and test.
        size: height and width of the images.
        noise: standard deviation of the noise; the stripes have an amplitude of 0.5.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % len(SHAPES)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    patterns = torch.stack([row // 2 % 2, column // 2 % 2, (row + column) // 2 % 2, (row // 2 + column // 2) % 2])
    pixels = 0.25 + 0.5 * patterns[labels] + noise * torch.randn(count, size, size, generator=generator)
    images = Images((255 * pixels.clamp(0, 1)).to(torch.uint8).unsqueeze(1), labels)
    sixth = count // 6
    parts = [
        Images(images.pixels[start:end], images.labels[start:end])
        for start, end in ((0, count - 2 * sixth), (count - 2 * sixth, count - sixth), (count - sixth, count))
    ]
    return ImageData(*parts, mean=(0.5,), std=(0.35,), num_classes=len(SHAPES))
