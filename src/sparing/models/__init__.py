"""PyTorch models with the layer shapes behind the published weight and MAC counts."""

from sparing.models.mobilenet import mobilenet_v1
from sparing.models.recurrent import fastgrnn
from sparing.models.resnet import resnet18, resnet50
from sparing.models.small import lenet_300_100, resnet8, resnet20

MODELS = {
    model.__name__: model for model in (fastgrnn, lenet_300_100, mobilenet_v1, resnet8, resnet18, resnet20, resnet50)
}

__all__ = ["MODELS", "fastgrnn", "lenet_300_100", "mobilenet_v1", "resnet8", "resnet18", "resnet20", "resnet50"]
