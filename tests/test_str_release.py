"""Checkpoints of the 2020 release, against networks written out once more in its layout and its arithmetic."""

import importlib.util
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


class STRConv(nn.Conv2d):
    """The release's layer: S = sign(W) · relu(|W| − sigmoid(s)), with s of shape (1, 1)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sparseThreshold = nn.Parameter(torch.full((1, 1), -3.0))

    def forward(self, x):
        weight = torch.sign(self.weight) * torch.relu(self.weight.abs() - torch.sigmoid(self.sparseThreshold))
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


def old_block(conv, inputs, width, stride, bottleneck):
    """A residual block; its parts are named as the release names them."""
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
    """As if after training: every number another, no two thresholds alike, activations of ordinary size."""
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
                # Of the size of the layer's weights, so that some of them live.
                size = float(module.weight.detach().std()) * (0.5 + 0.01 * thresholds)
                module.sparseThreshold.data.fill_(size).logit_()
    return net.eval()


def save(net, path, *, old_format=True):
    """The file that the release's main.py writes."""
    state = {f"module.{key}": tensor for key, tensor in net.state_dict().items()}
    content = {
        "epoch": 100,
        "arch": "ResNet50",
        "state_dict": state,
        "best_acc1": 74.31,
        "curr_acc1": 74.2,
        # Its learning rate is computed with NumPy.
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-4), "momentum": 0.875}]},
    }
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    if old_format:
        # As NumPy called itself in 2020.
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of every architecture, the network it was written from, and what that network says."""
    folder = tmp_path_factory.mktemp("official")
    torch.manual_seed(0)
    for arch, build in OLD.items():
        net = trained(build(STRConv))
        save(net, folder / f"{arch}.pth")
        x = torch.randn(2, 3, 224, 224)
        with torch.no_grad():
            torch.save((x, net.forward(x)), folder / f"{arch}-outputs.pt")
    return folder


def outputs(model, folder, arch):
    x, wanted = torch.load(folder / f"{arch}-outputs.pt")
    with torch.no_grad():
        return model.eval()(x), wanted


def zeros(state):
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_converted_network_computes_what_the_old_one_did(folder, arch):
    state = convert(folder / f"{arch}.pth", arch)
    assert 0.3 < zeros(state) < 0.9
    model = sparing.models.MODELS[arch]()
    model.load_state_dict(state, strict=True)
    new, old = outputs(model, folder, arch)
    assert old.std() > 1e-3
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4 * float(old.std()))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kept_thresholds_load_into_the_sparsified_network(folder, arch):
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


def test_a_dense_compatible_file_is_taken_as_it_is(tmp_path):
    net = trained(OLD["mobilenet_v1"](nn.Conv2d))
    save(net, tmp_path / "dense.pth", old_format=False)
    state = convert(tmp_path / "dense.pth", "mobilenet_v1")
    sparing.models.mobilenet_v1().load_state_dict(state, strict=True)
    assert torch.equal(state["fc.weight"], net.fc.weight[:, :, 0, 0])
    assert torch.equal(state["model.3.3.weight"], net.model[3][3].weight)
    with pytest.raises(InputError, match="holds no thresholds to keep"):
        convert(tmp_path / "dense.pth", "mobilenet_v1", keep_thresholds=True)


def test_a_first_layer_left_dense_stays_dense(tmp_path):
    net = trained(OLD["resnet18"](STRConv))
    first = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    net.conv1 = first
    save(net, tmp_path / "first.pth")
    assert torch.equal(convert(tmp_path / "first.pth", "resnet18")["conv1.weight"], first.weight)
    model = sparing.models.resnet18()
    sparing.sparsify_(model, STR(), sparing.select.excluding("conv1"))
    model.load_state_dict(convert(tmp_path / "first.pth", "resnet18", keep_thresholds=True), strict=True)


def test_a_bare_state_dict_and_other_numbers_of_classes(tmp_path):
    net = trained(old_mobilenet(STRConv, classes=7))
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    sparing.models.mobilenet_v1(num_classes=7).load_state_dict(convert(tmp_path / "bare.pth", "mobilenet_v1"))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvision_loads_the_backbone(folder, arch, torchvision_models):
    model = getattr(torchvision_models, arch)(weights=None)
    model.load_state_dict(with_bias(convert(folder / f"{arch}.pth", arch), arch), strict=True)
    new, old = outputs(model, folder, arch)
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4 * float(old.std()))


@pytest.fixture(scope="module")
def torchvision_models():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    # Its operators need CUDA libraries to load, and without them its import fails for want of these two.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchvision import models
    yield models
    del library  # and with it the operators


def test_what_has_no_counterpart_elsewhere_is_refused(folder):
    with pytest.raises(InputError, match="have no network with the layers of 'mobilenet_v1'"):
        with_bias({}, "mobilenet_v1")
    with pytest.raises(InputError, match="with thresholds is for sparing alone"):
        with_bias(convert(folder / "resnet18.pth", "resnet18", keep_thresholds=True), "resnet18")


def test_a_converted_file_is_evaluated_with_a_recipe(tmp_path, monkeypatch):
    net = trained(old_mobilenet(STRConv, classes=10))
    save(net, tmp_path / "old.pth")
    images = Images(torch.randint(0, 256, (10, 3, 224, 224), dtype=torch.uint8), torch.arange(10))
    data = ImageData(images, images, images, mean=(0.5,) * 3, std=(0.25,) * 3, num_classes=10)
    monkeypatch.setitem(DATASETS, "noise", lambda: data)
    (tmp_path / "recipe.yaml").write_text("model: {name: mobilenet_v1}\ndata: {name: noise}\n")
    with torch.no_grad():
        logits = net.forward((images.pixels / 255 - 0.5) / 0.25)
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
    """A class that a pickle names: reading it would run code."""


def changed(change):
    """A way to spoil the state dict of a good MobileNetV1 checkpoint."""

    def spoil(content):
        change(content["state_dict"])
        return content

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed(lambda s: s.pop("module.fc.weight")), r"is not a mobilenet_v1 \(it lacks 'fc.weight'\)$"),
        (changed(lambda s: s.pop("module.model.4.1.running_var")), "it lacks 'model.4.1.running_var'"),
        (changed(lambda s: s.update({"module.fc.bias": torch.zeros(1000)})), r"it has also 'fc.bias'\)"),
        (changed(lambda s: s.update({"module.model.0.0.weight": torch.zeros(32, 3, 5, 5)})),
         r"'model.0.0.weight' has shape \(32, 3, 5, 5\), not \(32, 3, 3, 3\)"),
        (changed(lambda s: s.update({"module.fc.weight": torch.zeros(1000)})), "'fc.weight' has shape"),
        (changed(lambda s: s.update({"module.model.0.1.sparseThreshold": torch.zeros(2)})), "not one s"),
        (changed(lambda s: s.update({"module.model.0.9.sparseThreshold": torch.zeros(1, 1)})), "there is no weight"),
        (lambda content: {**content, "state_dict": {}}, "holds no 'state_dict' of tensors"),
        (lambda content: [1, 2], "holds no 'state_dict' of tensors"),
        (lambda content: {**content, "args": Opaque()}, "holds more than tensors and plain values, .*Opaque for one"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(folder, tmp_path, spoil, message):
    content = torch.load(folder / "mobilenet_v1.pth", weights_only=False)
    torch.save(spoil(content), tmp_path / "spoilt.pth")
    with pytest.raises(CheckpointError, match=message) as error:
        convert(tmp_path / "spoilt.pth", "mobilenet_v1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("old_format", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, old_format, share):
    save(old_mobilenet(STRConv, classes=2), tmp_path / "whole.pth", old_format=old_format)
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "part.pth").write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match="part.pth: unreadable or truncated"):
        convert(tmp_path / "part.pth", "mobilenet_v1")


def test_files_of_another_kind_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a resnet18 \(.*\); it is a resnet50$"):
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


def test_the_command_writes_what_convert_gives(folder, tmp_path):
    old = str(folder / "resnet18.pth")
    done = run_cli("convert", old, "--arch", "resnet18", "--out", "dense.safetensors", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    wanted, written = convert(old, "resnet18"), load_file(tmp_path / "dense.safetensors")
    assert wanted.keys() == written.keys()
    assert all(torch.equal(wanted[key], written[key]) for key in wanted)
    model = sparing.models.resnet18()
    model.load_state_dict(written)
    total = sparing.report(model).total
    assert (answer["weights"], answer["nonzero"], answer["thresholds"]) == (total.weights, total.nonzero, 0)
    done = run_cli("convert", old, "--arch", "resnet18", "--out", "s.safetensors", "--keep-thresholds", cwd=tmp_path)
    assert "11,678,912 weights and 21 thresholds" in done.stdout
    assert load_file(tmp_path / "s.safetensors")["fc.parametrizations.weight.0.s"].shape == (1,)
    done = run_cli("convert", old, "--arch", "resnet18", "--out", "tv.safetensors", "--names", "torchvision",
                   cwd=tmp_path)  # fmt: skip
    assert load_file(tmp_path / "tv.safetensors").keys() == wanted.keys() | {"fc.bias"}
    done = run_cli("convert", old, "--arch", "resnet50", "--out", "x.safetensors", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert not (tmp_path / "x.safetensors").exists()
