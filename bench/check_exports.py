"""Does every model of sparing.models, sparse at 90 %, compute in each runtime what it computes in torch?

python bench/check_exports.py [MODEL ...]

Prints a row a model and format: the size, and the largest difference to torch on random inputs, as a
fraction of the largest output. Exit status 1 if one fails.
"""

import sys
import tempfile
from pathlib import Path

import torch

import sparing
from sparing.export.formats import FORMATS

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
