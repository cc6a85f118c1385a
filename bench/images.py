"""Measure images per second of sparing's loaders and of plain torchvision, for training on JPEG files.

    python bench/images.py [--images 400] [--workers 2] [--size 224] [--batch 64] [--rounds 7] [--json FILE]

The images are 500 × 375 JPEG files of about 100 kB, as in ImageNet, made from noise. torchvision is ImageFolder with a
DataLoader and v2 transforms to normalized float32, which is what its reference scripts do. All loaders have the same
random crops and flips, batches and numbers of persistent workers. An epoch of each in turn is a round. With
--workers 0, everything is in one process, and CPU time is measured, which other programs disturb less.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sparing.data import DATASETS
from sparing.data.pictures import MEAN, STD
from sparing.files import write_text

ROOT = Path(__file__).parent.parent


def write_images(root: Path, count: int, classes: int = 4) -> None:
    """Write `count` training images; `val` has one image per class."""
    rng = np.random.default_rng(0)
    for number in range(count + classes):
        split = "train" if number < count else "val"
        folder = root / split / f"class{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 255, (94, 125, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05}.JPEG", quality=92)


def torchvision_loader(root: Path, size: int, batch: int, workers: int) -> DataLoader:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose([
        v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
    ])  # fmt: skip
    data = ImageFolder(str(root / "train"), transform)
    return DataLoader(data, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 400), ("workers", 2), ("size", 224), ("batch", 64), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="file for the results")
    given = parser.parse_args()
    clock = time.perf_counter if given.workers else time.process_time
    try:
        import torchvision
    except RuntimeError:  # a CUDA build with a CPU torch: declare the two operators that the import needs
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, given.images)
        for split in ("train", "val"):
            command = [
                sys.executable,
                ROOT / "examples" / "04_write_shards.py",
                root / split,
                root / f"{split}-shard",
                "1",
            ]
            subprocess.run(command, check=True, capture_output=True)
        arguments = {"size": given.size, "workers": given.workers}
        folders = DATASETS["imagenet"](str(root), validation_per_class=0, **arguments)
        tars = DATASETS["webdataset"](
            f"{root}/train-shard-0000.tar", f"{root}/val-shard-0000.tar", given.images, 4, 4, **arguments
        )
        loaders = {
            "torchvision": torchvision_loader(root, given.size, given.batch, given.workers),
            "folders": folders.training(given.batch, 0),
            "shards": tars.training(given.batch, 0),
        }
        speeds: dict[str, list[float]] = {name: [] for name in loaders}
        for number in range(given.rounds + 1):
            for name, loader in loaders.items():
                if name != "torchvision":
                    loader.epoch = number
                began = clock()
                seen = sum(len(labels) for _, labels in loader)
                assert seen == given.images
                if number:  # the first round starts the worker processes
                    speeds[name].append(seen / (clock() - began))
    rows = {
        name: {"median": statistics.median(each), "slowest": min(each), "fastest": max(each)}
        for name, each in speeds.items()
    }
    base = rows["torchvision"]
    print(f"images per second, {given.workers} worker(s), {given.size} pixels, {given.rounds} rounds, "
          f"torch {torch.__version__}, torchvision {torchvision.__version__}")  # fmt: skip
    for name, row in rows.items():
        row["ratio"], row["ratio_fastest"] = row["median"] / base["median"], row["fastest"] / base["fastest"]
        print(f"{name:12} median {row['median']:7.1f} ({row['ratio']:.3f}x)", end="  ")
        print(f"fastest {row['fastest']:7.1f} ({row['ratio_fastest']:.3f}x)  slowest {row['slowest']:7.1f}")
    if given.json:
        write_text(
            given.json, json.dumps({"arguments": {**vars(given), "json": None}, "speeds": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
