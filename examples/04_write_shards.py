"""Write images with one folder per class to tar shards of equal size, in random order.

    python examples/04_write_shards.py imagenet/train shards/train 129
    python examples/04_write_shards.py imagenet/val shards/val 16

The first command writes shards/train-0000.tar to shards/train-0128.tar and prints the number of images in each.
"""

import argparse
import io
import random
import tarfile
from pathlib import Path

from sparing.files import atomic_write

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path, help="folder that contains one folder per class")
parser.add_argument("prefix", type=Path, help="path prefix of the shards: PREFIX-0000.tar etc.")
parser.add_argument("shards", type=int, help="number of shards")
arguments = parser.parse_args()

# Classes are labelled in the order of their names, as in sparing.data.folders.imagenet.
classes = sorted(path.name for path in arguments.folder.iterdir() if path.is_dir() and path.name[0] != ".")
images = [
    (label, path)
    for label, name in enumerate(classes)
    for path in sorted((arguments.folder / name).iterdir())
    if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") and path.name[0] != "."
]
# Training shuffles the shards and neighbouring images, so shuffle all images here.
random.Random(0).shuffle(images)

arguments.prefix.parent.mkdir(parents=True, exist_ok=True)
for number in range(arguments.shards):
    shard = arguments.prefix.with_name(f"{arguments.prefix.name}-{number:04}.tar")
    own = images[number :: arguments.shards]
    with atomic_write(shard) as temporary, tarfile.open(temporary, "w") as tar:
        for label, path in own:
            # Everything after the first dot of a file name is its extension.
            key = f"{path.parent.name}/{path.stem.replace('.', '_')}"
            for extension, content in ((path.suffix[1:].lower(), path.read_bytes()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    print(f"{shard}: {len(own)}")
print(f"{len(images)} images of {len(classes)} classes in {arguments.shards} shards")
