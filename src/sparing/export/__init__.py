"""Export trained networks to smaller files and faster runtimes.

`compressed` requires only torch and safetensors (and NumPy, which safetensors uses to write files). Every other
module names the packages of the extra `sparing[export]` that it requires.
"""

from sparing.export import compressed

__all__ = ["compressed"]
