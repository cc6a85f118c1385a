"""From a trained network to something smaller on disk and faster to run.

`compressed` needs torch and safetensors alone (and NumPy, as safetensors does to write); every other
module names in its own docstring what it needs of the extra `sparing[export]`.
"""

from sparing.export import compressed

__all__ = ["compressed"]
