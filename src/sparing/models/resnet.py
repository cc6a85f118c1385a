"""ResNet-18 and ResNet-50 for ImageNet, as in the STR paper.

ResNet-50 is v1.5: the stride of a bottleneck block is in its 3×3 convolution. It has 25,502,912 weights
and needs 4,089,184,256 MACs per image of 224×224 pixels. The classifiers have no bias.

References: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; Kusupati et al., "Soft
Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020, section 4.1.
"""

from torch import Tensor, nn

from sparing.errors import check_sizes


def resnet18(num_classes: int = 1000) -> nn.Module:
    """Build a ResNet-18: four stages of 2 basic blocks.

    Args:
        num_classes: number of classes.

    Returns:
        A module from images (N, 3, H, W) to logits (N, num_classes).

    Raises:
        InputError: an argument is out of range.

    Examples:
        >>> sum(p.numel() for p in resnet18(num_classes=10).fc.parameters())
        5120
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes)


def resnet50(num_classes: int = 1000) -> nn.Module:
    """Build a ResNet-50 v1.5: four stages of 3, 4, 6 and 3 bottleneck blocks.

    Args:
        num_classes: number of classes.

    Returns:
        A module from images (N, 3, H, W) to logits (N, num_classes).

    Raises:
        InputError: an argument is out of range.

    Examples:
        >>> resnet50().layer1[0].conv2.weight.shape
        torch.Size([64, 64, 3, 3])
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes)


class BasicBlock(nn.Module):
    """Residual block of two 3×3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.downsample(x))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """Residual block of 1×1, 3×3 and 1×1 convolutions, with the stride in the 3×3 convolution."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self.downsample(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """ImageNet stem, four stages of residual blocks, average pooling and a classifier without bias."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        check_sizes("resnet", num_classes=num_classes)
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages, inputs = [], 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            blocks = []
            for index in range(depth):
                blocks.append(block(inputs, width, stride=2 if stage > 0 and index == 0 else 1))
                inputs = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes, bias=False)
        initialize_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def initialize_(model: nn.Module) -> None:
    """Initialize every Conv2d and Linear weight with Kaiming normal (fan-in, ReLU gain), as the STR release does."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
