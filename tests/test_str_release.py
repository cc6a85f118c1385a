"""Conversion of checkpoints of the 2020 STR release, compared with a reimplementation of its networks."""

import json
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import sparing
from sparing import STR, CheckpointError, InputError
from sparing.data import DATASETS, ImageData, Images
from sparing.export.str_release import ARCHITECTURES, convert, with_bias
from test_cli import sparing as run_cli
from tolerance import near


class STRConv(nn.Conv2d):
    """Convolution of the release: effective weight sign(W) · relu(|W| − sigmoid(s)), with s of shape (1, 1)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sparseThreshold = nn.Parameter(torch.full((1, 1), -3.0))

    def forward(self, x):
        weight = torch.sign(self.weight) * torch.relu(self.weight.abs() - torch.sigmoid(self.sparseThreshold))
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


def old_block(conv, inputs, width, stride, bottleneck):
    """Return a residual block with the module names of the release."""
    outputs = 4 * width if bottleneck else width
    block = nn.Module()
    if bottleneck:
        shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
    else:
        shapes = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
    for number, (before, after, kernel, step) in enumerate(shapes, 1):
        setattr(block, f"conv{number}", conv(before, after, kernel, step, kernel // 2, bias=False))
        setattr(block, f"bn{number}", nn.BatchNorm2d(after))
    block.downsample = None
    if stride != 1 or inputs != outputs:
        block.downsample = nn.Sequential(conv(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(x):
        out = x
        for number in range(1, len(shapes) + 1):
            out = getattr(block, f"bn{number}")(getattr(block, f"conv{number}")(out))
            out = torch.relu(out) if number < len(shapes) else out
        return torch.relu(out + (x if block.downsample is None else block.downsample(x)))

    block.forward = forward
    return block, outputs


def old_resnet(conv, depths, bottleneck, classes=1000):
    net = nn.Module()
    net.conv1, net.bn1 = conv(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
    inputs = 64
    for stage, depth in enumerate(depths):
        blocks = []
        for index in range(depth):
            stride = 2 if stage and not index else 1
            block, inputs = old_block(conv, inputs, 64 * 2**stage, stride, bottleneck)
            blocks.append(block)
        setattr(net, f"layer{stage + 1}", nn.Sequential(*blocks))
    net.fc = conv(inputs, classes, 1, bias=False)

    def forward(x):
        x = F.max_pool2d(torch.relu(net.bn1(net.conv1(x))), 3, 2, 1)
        for stage in range(4):
            x = getattr(net, f"layer{stage + 1}")(x)
        return net.fc(F.adaptive_avg_pool2d(x, 1)).flatten(1)

    net.forward = forward
    return net


def old_mobilenet(conv, classes=1000):
    def unit(inputs, outputs, kernel, stride, groups=1):
        layer = conv(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return layer, nn.BatchNorm2d(outputs), nn.ReLU()

    channels = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    stages = [nn.Sequential(*unit(3, 32, 3, 2))]
    for before, after, stride in zip(channels[:-1], channels[1:], strides, strict=True):
        stages.append(nn.Sequential(*unit(before, before, 3, stride, groups=before), *unit(before, after, 1, 1)))
    net = nn.Module()
    net.model = nn.Sequential(*stages, nn.AvgPool2d(7))
    net.fc = conv(1024, classes, 1, bias=False)
    net.forward = lambda x: net.fc(net.model(x)).flatten(1)
    return net


OLD = {
    "resnet18": lambda conv: old_resnet(conv, (2, 2, 2, 2), False),
    "resnet50": lambda conv: old_resnet(conv, (3, 4, 6, 3), True),
    "mobilenet_v1": old_mobilenet,
}


def trained(net):
    """Initialize as if after training: random statistics, a different threshold per layer, activations of order 1."""
    thresholds = 0
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.0)
            module.num_batches_tracked.fill_(500_400)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, STRConv):
                thresholds += 1
                # Of the order of the weights, so that some of them stay active.
                size = float(module.weight.detach().std()) * (0.5 + 0.01 * thresholds)
                module.sparseThreshold.data.fill_(size).logit_()
    return net.eval()


def save(net, path, *, old_format=True):
    """Write a checkpoint in the format of main.py of the release."""
    state = {f"module.{key}": tensor for key, tensor in net.state_dict().items()}
    content = {
        "epoch": 100,
        "arch": "ResNet50",
        "state_dict": state,
        "best_acc1": 74.31,
        "curr_acc1": 74.2,
        # The release computes the learning rate with NumPy.
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-4), "momentum": 0.875}]},
    }
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    if old_format:
        # The module name of NumPy in 2020.
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a checkpoint of each architecture, with an input and the outputs of its network."""
    folder = tmp_path_factory.mktemp("release")
    torch.manual_seed(0)
    for arch, build in OLD.items():
        net = trained(build(STRConv))
        save(net, folder / f"{arch}.pth")
        x = torch.randn(2, 3, 224, 224)
        with torch.no_grad():
            torch.save((x, net.forward(x)), folder / f"{arch}-outputs.pt")
    return folder


def outputs(model, folder, arch):
    """The outputs of the model and of the original network, and the tolerance for comparing them."""
    x, expected = torch.load(folder / f"{arch}-outputs.pt")
    with torch.no_grad():
        return model.eval()(x), expected, near(model, x[:1], draws=1)


def zeros(state):
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_converted_network_outputs_match(folder, arch):
    state = convert(folder / f"{arch}.pth", arch)
    assert 0.3 < zeros(state) < 0.9
    model = sparing.models.MODELS[arch]()
    model.load_state_dict(state, strict=True)
    new, old, close = outputs(model, folder, arch)
    assert old.std() > 1e-3
    torch.testing.assert_close(new, old, **close)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kept_thresholds_load_into_a_sparsified_model(folder, arch):
    state = convert(folder / f"{arch}.pth", arch, keep_thresholds=True)
    model = sparing.models.MODELS[arch]()
    sparing.sparsify_(model, STR())
    model.load_state_dict(state, strict=True)
    old = torch.load(folder / f"{arch}.pth", weights_only=False)["state_dict"]
    for name, layer in sparing.sparse_layers(model).items():
        assert torch.equal(layer.parametrization.s.detach(), old[f"module.{name}.sparseThreshold"].reshape(1))
        assert torch.equal(layer.weight.detach().flatten(), old[f"module.{name}.weight"].flatten())
    dense = convert(folder / f"{arch}.pth", arch)
    mine = sparing.dense_state_dict(model)
    assert mine.keys() == dense.keys()
    assert all(torch.equal(mine[key], dense[key]) for key in dense)


def test_weights_without_thresholds_are_not_changed(tmp_path):
    net = trained(OLD["mobilenet_v1"](nn.Conv2d))
    save(net, tmp_path / "dense.pth", old_format=False)
    state = convert(tmp_path / "dense.pth", "mobilenet_v1")
    sparing.models.mobilenet_v1().load_state_dict(state, strict=True)
    assert torch.equal(state["fc.weight"], net.fc.weight[:, :, 0, 0])
    assert torch.equal(state["model.3.3.weight"], net.model[3][3].weight)
    with pytest.raises(InputError, match="has no thresholds; convert it without keeping thresholds"):
        convert(tmp_path / "dense.pth", "mobilenet_v1", keep_thresholds=True)


def test_layer_without_a_threshold_stays_dense(tmp_path):
    net = trained(OLD["resnet18"](STRConv))
    first = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    net.conv1 = first
    save(net, tmp_path / "first.pth")
    assert torch.equal(convert(tmp_path / "first.pth", "resnet18")["conv1.weight"], first.weight)
    model = sparing.models.resnet18()
    sparing.sparsify_(model, STR(), sparing.select.excluding("conv1"))
    model.load_state_dict(convert(tmp_path / "first.pth", "resnet18", keep_thresholds=True), strict=True)


def test_plain_state_dict_and_other_number_of_classes(tmp_path):
    net = trained(old_mobilenet(STRConv, classes=7))
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    sparing.models.mobilenet_v1(num_classes=7).load_state_dict(convert(tmp_path / "bare.pth", "mobilenet_v1"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_converted_resnet_loads_into_torchvision(folder, arch, torchvision_models):
    model = getattr(torchvision_models, arch)(weights=None)
    model.load_state_dict(with_bias(convert(folder / f"{arch}.pth", arch), arch), strict=True)
    new, old, close = outputs(model, folder, arch)
    torch.testing.assert_close(new, old, **close)


@pytest.fixture(scope="module")
def torchvision_models(vision_operators):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchvision.models", reason="torchvision is not installed")


def test_with_bias_rejects_mobilenet_and_thresholds(folder):
    with pytest.raises(InputError, match="have no equivalent of 'mobilenet_v1'; choose a ResNet"):
        with_bias({}, "mobilenet_v1")
    with pytest.raises(InputError, match="torchvision and timm cannot load thresholds"):
        with_bias(convert(folder / "resnet18.pth", "resnet18", keep_thresholds=True), "resnet18")


@pytest.mark.slow
def test_converted_file_is_evaluated_with_a_recipe(tmp_path, monkeypatch):
    net = trained(old_mobilenet(STRConv, classes=10))
    save(net, tmp_path / "old.pth")
    images = Images(torch.randint(0, 256, (10, 3, 224, 224), dtype=torch.uint8), torch.arange(10))
    data = ImageData(images, images, images, mean=(0.5,) * 3, std=(0.25,) * 3, num_classes=10)
    monkeypatch.setitem(DATASETS, "noise", lambda: data)
    (tmp_path / "recipe.yaml").write_text("model: {name: mobilenet_v1}\ndata: {name: noise}\nmethod: {name: str}\n")
    x = (images.pixels / 255 - 0.5) / 0.25
    with torch.no_grad():
        logits = net.forward(x)
    model = sparing.models.mobilenet_v1(num_classes=10)
    model.load_state_dict(convert(tmp_path / "old.pth", "mobilenet_v1"))
    gaps = logits.sort(dim=1).values.diff(dim=1)
    assert gaps.min() > 2 * near(model.eval(), x[:1], draws=1)["atol"], "rounding can change the order of the logits"
    answers = []
    for options in ([], ["--keep-thresholds"]):
        done = run_cli("convert", "old.pth", "--arch", "mobilenet_v1", "--out", "new.safetensors", *options,
                       cwd=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr
        done = run_cli("eval", "new.safetensors", "--recipe", "recipe.yaml", "--json", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        answers.append(json.loads(done.stdout))
    assert answers[0] == answers[1]
    assert answers[0]["correct"] == int((logits.argmax(1) == images.labels).sum())
    assert answers[0]["top5_accuracy"] == sum(
        int(label) in row.topk(5).indices for row, label in zip(logits, images.labels, strict=True)
    ) / len(images)
    assert 0.3 < answers[0]["sparsity"] < 0.9


class Opaque:
    """Class in a pickle. Loading it would run code."""


def changed(change):
    """Return a function that modifies the state dict of a valid MobileNetV1 checkpoint."""

    def modify(content):
        change(content["state_dict"])
        return content

    return modify


@pytest.mark.parametrize(
    ("modify", "message"),
    [
        (changed(lambda s: s.pop("module.fc.weight")), r"is not a mobilenet_v1 \(missing key 'fc.weight'\)$"),
        (changed(lambda s: s.pop("module.model.4.1.running_var")), "missing key 'model.4.1.running_var'"),
        (changed(lambda s: s.update({"module.fc.bias": torch.zeros(1000)})), r"unexpected key 'fc.bias'\)"),
        (changed(lambda s: s.update({"module.model.0.0.weight": torch.zeros(32, 3, 5, 5)})),
         r"'model.0.0.weight' has shape \(32, 3, 5, 5\), expected \(32, 3, 3, 3\)"),
        (changed(lambda s: s.update({"module.fc.weight": torch.zeros(1000)})), "'fc.weight' has shape"),
        (changed(lambda s: s.update({"module.model.0.1.sparseThreshold": torch.zeros(2)})),
         "must be a floating point tensor with one element"),
        (changed(lambda s: s.update({"module.model.0.9.sparseThreshold": torch.zeros(1, 1)})),
         "layer 'model.0.9' has a threshold but no weight"),
        (lambda content: {**content, "state_dict": {}}, "has no 'state_dict' of tensors"),
        (lambda content: [1, 2], "has no 'state_dict' of tensors"),
        (lambda content: {**content, "args": Opaque()},
         "has objects other than tensors and plain values, such as .*Opaque"),
    ],
)  # fmt: skip
def test_invalid_checkpoint_raises_a_one_line_error(folder, tmp_path, modify, message):
    content = torch.load(folder / "mobilenet_v1.pth", weights_only=False)
    torch.save(modify(content), tmp_path / "modified.pth")
    with pytest.raises(CheckpointError, match=message) as error:
        convert(tmp_path / "modified.pth", "mobilenet_v1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("old_format", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file_raises(tmp_path, old_format, share):
    save(old_mobilenet(STRConv, classes=2), tmp_path / "whole.pth", old_format=old_format)
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "part.pth").write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match="part.pth: unreadable or truncated"):
        convert(tmp_path / "part.pth", "mobilenet_v1")


def test_other_architectures_and_files_raise(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a resnet18 \(.*\); the checkpoint is a resnet50$"):
        convert(folder / "resnet50.pth", "resnet18")
    with pytest.raises(InputError, match="unknown architecture 'resnet5'; did you mean 'resnet50'"):
        convert(folder / "resnet50.pth", "resnet5")
    with pytest.raises(CheckpointError, match="there is no such file"):
        convert(tmp_path / "absent.pth", "resnet18")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme", "not a checkpoint")
    for name in ("text.pth", "zip.pth"):
        with pytest.raises(CheckpointError, match="unreadable or truncated"):
            convert(tmp_path / name, "resnet18")


@pytest.mark.slow
def test_convert_command_writes_the_converted_state_dict(folder, tmp_path):
    old = str(folder / "resnet18.pth")
    done = run_cli("convert", old, "--arch", "resnet18", "--out", "dense.safetensors", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    expected, written = convert(old, "resnet18"), load_file(tmp_path / "dense.safetensors")
    assert expected.keys() == written.keys()
    assert all(torch.equal(expected[key], written[key]) for key in expected)
    model = sparing.models.resnet18()
    model.load_state_dict(written)
    total = sparing.report(model).total
    assert (answer["weights"], answer["nonzero"], answer["thresholds"]) == (total.weights, total.nonzero, 0)
    done = run_cli("convert", old, "--arch", "resnet18", "--out", "s.safetensors", "--keep-thresholds", cwd=tmp_path)
    assert "11,678,912 weights and 21 thresholds" in done.stdout
    assert load_file(tmp_path / "s.safetensors")["fc.parametrizations.weight.0.s"].shape == (1,)
    done = run_cli("convert", old, "--arch", "resnet18", "--out", "tv.safetensors", "--names", "torchvision",
                   cwd=tmp_path)  # fmt: skip
    assert load_file(tmp_path / "tv.safetensors").keys() == expected.keys() | {"fc.bias"}
    done = run_cli("convert", old, "--arch", "resnet50", "--out", "x.safetensors", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert not (tmp_path / "x.safetensors").exists()
