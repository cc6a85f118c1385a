"""Networks for small images: residual networks with 6n + 2 layers, and LeNet-300-100.

References: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2; LeCun et al.,
"Gradient-based learning applied to document recognition", Proceedings of the IEEE, 1998, section III.
Deviation: where the shape of a residual network changes, the shortcut is a 1×1 convolution instead of zero padding.
"""

from collections import OrderedDict

from torch import Tensor, nn

from sparing.errors import check_sizes
from sparing.models.resnet import BasicBlock, initialize_


def lenet_300_100(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Build LeNet-300-100: three Linear layers for images of 28×28 pixels. It has 266,200 weights.

    Args:
        num_classes: number of classes.
        in_channels: number of image channels.

    Returns:
        A module from images (N, in_channels, 28, 28) to logits (N, num_classes).

    Raises:
        InputError: an argument is out of range.

    Examples:
        >>> lenet_300_100().fc2
        Linear(in_features=300, out_features=100, bias=True)
    """
    check_sizes("lenet_300_100", num_classes=num_classes, in_channels=in_channels)
    layers = OrderedDict[str, nn.Module](
        flatten=nn.Flatten(),
        fc1=nn.Linear(in_channels * 28 * 28, 300),
        relu1=nn.ReLU(),
        fc2=nn.Linear(300, 100),
        relu2=nn.ReLU(),
        fc3=nn.Linear(100, num_classes),
    )
    return nn.Sequential(layers)


def resnet8(num_classes: int = 10, in_channels: int = 1, width: int = 16, stem_stride: int = 1) -> nn.Module:
    """Build a ResNet-8: three stages of 1 basic block. It has 77,072 weights with the default arguments.

    Args:
        num_classes: number of classes.
        in_channels: number of image channels: 1 for gray, 3 for color.
        width: channels of the first stage. The second stage has 2x as many, the third 4x.
        stem_stride: stride of the first convolution. A stride of 2 reduces the MACs to about a quarter.

    Returns:
        A module from images (N, in_channels, H, W) to logits (N, num_classes).

    Raises:
        InputError: an argument is out of range.

    Examples:
        >>> resnet8().fc
        Linear(in_features=64, out_features=10, bias=False)
    """
    return SmallResNet(1, num_classes, in_channels, width, stem_stride)


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16, stem_stride: int = 1) -> nn.Module:
    """Build a ResNet-20: three stages of 3 basic blocks. The arguments are those of `resnet8`.

    Raises:
        InputError: an argument is out of range.

    Examples:
        >>> len(resnet20().layer1)
        3
    """
    return SmallResNet(3, num_classes, in_channels, width, stem_stride)


class SmallResNet(nn.Module):
    """3×3 stem, three stages of basic blocks, average pooling and a classifier without bias."""

    def __init__(self, depth: int, num_classes: int, in_channels: int, width: int, stem_stride: int) -> None:
        super().__init__()
        name = f"resnet{6 * depth + 2}"
        check_sizes(name, num_classes=num_classes, in_channels=in_channels, width=width, stem_stride=stem_stride)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        stages, inputs = [], width
        for stage in range(3):
            outputs = width * 2**stage
            blocks = []
            for index in range(depth):
                blocks.append(BasicBlock(inputs, outputs, stride=2 if stage > 0 and index == 0 else 1))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes, bias=False)
        initialize_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]
