"""Check that every model of sparing.models, at 90 % sparsity, has the same outputs in each runtime as in PyTorch.

python bench/check_exports.py [MODEL ...]

Prints one row per model and format: file size, and maximum relative error against PyTorch on random inputs. Exit
status 1 if an export fails.
"""

import sys
import tempfile
from pathlib import Path

import torch

import sparing
from sparing.formats import FORMATS

EXAMPLES = {"fastgrnn": (1, 99, 32), "resnet8": (1, 1, 28, 28), "resnet20": (1, 3, 32, 32)}


def main():
    failed = False
    for name in sys.argv[1:] or sparing.models.MODELS:
        torch.manual_seed(0)
        model = sparing.models.MODELS[name]()
        sparing.sparsify_(model, sparing.StaticRandom(budget=sparing.Budget.uniform(model, 0.9)))
        with tempfile.TemporaryDirectory() as folder:
            for kind, (file, save) in FORMATS.items():
                try:
                    written = save(model, Path(folder, file), EXAMPLES.get(name, (1, 3, 224, 224)))
                except sparing.InputError as error:
                    failed = True
                    print(f"{name:<14}{kind:<13}FAIL {error}")
                else:
                    print(f"{name:<14}{kind:<13}{written.bytes:>12,} bytes  {written.error:.1e}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
