"""Inference on the CPU whose time follows the number of nonzero weights.

    fast = sparing.engine.compile(model, (1, 3, 224, 224))
    outputs = fast(images)

Convolutions and linear layers multiply by their nonzero weights only, in float32. A C++ compiler is required at the
first use.
"""

from sparing.engine.module import Engine, compile

__all__ = ["Engine", "compile"]
