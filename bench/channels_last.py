"""Check whether torch's convolutions survive channels_last on several threads, by the width of a small ResNet.

    python bench/channels_last.py [--widths 2 8 12 16 24] [--threads 2]

Each width trains a dense network, without sparing's masks or thresholds, for 60 steps in a process of its own, with the
memory checks of glibc. torch 2.13.0+cpu crashes at 12 channels or fewer on two threads, and at no width with the
default memory format.
"""

import argparse
import os
import subprocess
import sys

import torch
from torch.nn import functional as F

import sparing


def train(width, channels_last, threads):
    """Train in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = sparing.models.resnet8(width=width).to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(60):
        images = torch.randn(175, 1, 28, 28).to(memory_format=memory_format)
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.randint(0, 10, (175,))).backward()
        optimizer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 8, 12, 16, 24])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--in-this-process", choices=["default", "channels_last"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        train(options.widths[0], options.in_this_process == "channels_last", options.threads)
        return
    environment = {**os.environ, "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "85"}
    for width in options.widths:
        for kind in ("default", "channels_last"):
            command = [sys.executable, __file__, "--widths", str(width), "--threads", str(options.threads)]
            done = subprocess.run([*command, "--in-this-process", kind], env=environment, capture_output=True)
            print(
                f"width {width:3} {kind:14} {'survives' if done.returncode == 0 else f'exit {done.returncode}'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
