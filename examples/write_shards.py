"""Write pictures that lie in a folder a class into tar shards of one size, in random order.

    python write_shards.py imagenet/train shards/train 129
    python write_shards.py imagenet/val shards/val 16

writes shards/train-0000.tar to shards/train-0128.tar and so on, and prints how many pictures are in each.
"""

import argparse
import random
from pathlib import Path

import webdataset

from sparing.files import atomic_write

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path, help="holds a folder a class")
parser.add_argument("prefix", type=Path, help="of the shards: PREFIX-0000.tar and so on")
parser.add_argument("shards", type=int, help="how many to write")
arguments = parser.parse_args()

# The order of the names is the order of the labels, as for data in folders.
classes = sorted(path.name for path in arguments.folder.iterdir() if path.is_dir() and path.name[0] != ".")
pictures = [
    (label, path)
    for label, name in enumerate(classes)
    for path in sorted((arguments.folder / name).iterdir())
    if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") and path.name[0] != "."
]
# Once and for all: in training only whole shards and what fits in a buffer are mixed.
random.Random(0).shuffle(pictures)

arguments.prefix.parent.mkdir(parents=True, exist_ok=True)
for number in range(arguments.shards):
    shard = arguments.prefix.with_name(f"{arguments.prefix.name}-{number:04}.tar")
    own = pictures[number :: arguments.shards]
    with atomic_write(shard) as temporary, webdataset.TarWriter(str(temporary)) as tar:
        for label, path in own:
            # What is after the first dot of a name in a shard says what it holds.
            key = f"{path.parent.name}/{path.stem.replace('.', '_')}"
            tar.write({"__key__": key, path.suffix[1:].lower(): path.read_bytes(), "cls": str(label).encode()})
    print(f"{shard}: {len(own)}")
print(f"{len(pictures)} pictures of {len(classes)} classes in {arguments.shards} shards")
