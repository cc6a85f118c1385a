"""MobileNetV1 for image classification.

At width 1 it has 4,209,088 weights and needs 568,740,352 MACs per image of 224×224 pixels. Module names
(`model.<i>.<j>`, `fc`) and initialization follow the 2020 release of STR: the classifier is initialized
with Kaiming normal (fan-in), the convolutions keep PyTorch's default.

Reference: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
Applications", 2017.
"""

from torch import Tensor, nn

from sparing.errors import InputError, check_sizes
from sparing.models.resnet import initialize_

# (output channels, stride) of each of the 13 depthwise-separable blocks.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


def mobilenet_v1(num_classes: int = 1000, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """Build a MobileNetV1: a 3×3 convolution, 13 depthwise-separable blocks and a linear classifier.

    Args:
        num_classes: number of classes.
        width: width multiplier for the channels of every layer.
        in_channels: number of image channels: 1 for gray, 3 for color.

    Returns:
        A module from images (N, in_channels, H, W) to logits (N, num_classes).

    Raises:
        InputError: an argument is out of range.

    Examples:
        >>> mobilenet_v1(num_classes=10).fc
        Linear(in_features=1024, out_features=10, bias=False)
    """
    return MobileNetV1(num_classes, width, in_channels)


class MobileNetV1(nn.Module):
    """MobileNetV1, built by `mobilenet_v1`."""

    def __init__(self, num_classes: int, width: float, in_channels: int) -> None:
        super().__init__()
        check_sizes("mobilenet_v1", num_classes=num_classes, in_channels=in_channels)
        if isinstance(width, bool) or not isinstance(width, (int, float)) or not 1 / 32 <= width < float("inf"):
            raise InputError(f"mobilenet_v1: width must be a number >= 1/32, so that no layer is empty, got {width!r}")
        inputs = int(32 * width)
        layers = [_convolution(in_channels, inputs, 3, stride=2)]
        for channels, stride in BLOCKS:
            outputs = int(channels * width)
            depthwise = _convolution(inputs, inputs, 3, stride, groups=inputs)
            layers.append(nn.Sequential(*depthwise, *_convolution(inputs, outputs, 1)))
            inputs = outputs
        self.model = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes, bias=False)
        initialize_(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.model(x)).flatten(1))  # type: ignore[no-any-return]


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
