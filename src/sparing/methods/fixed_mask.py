"""FixedMask: keep the zeros that are there, and train the other weights.

    M = 1{W ≠ 0}             once, when the model is sparsified
    S = W ⊙ M,   dW = dS ⊙ M

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015, section 3:
after pruning, the remaining weights are trained on.
"""

import warnings
from dataclasses import dataclass

from sparing.errors import SparsityWarning
from sparing.method import Layers, Method, Optimizers, Parametrizations
from sparing.parametrizations import Mask
from sparing.sparsifier import Sparsifier


@dataclass(frozen=True)
class FixedMask(Method):
    """Fine-tune a sparse model and keep its zeros, of whatever pattern they are.

    Load the sparse weights before `sparsify_`, which makes the masks of them.

    Examples:
        >>> model = nn.Linear(100, 10)
        >>> _ = sparsify_(model, GMP(sparsity=0.9, begin=0, end=0))
        >>> _ = sparsify_(densify_(model), FixedMask())
        >>> report(model).total.nonzero
        100
    """

    name = "fixed_mask"

    def parametrizations(self, layers: Layers, plan: None) -> Parametrizations:
        return {name: Mask(layer.weight != 0) for name, layer in layers.items()}

    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        # Not in sparsify_: a model that resumes is dense until its checkpoint is loaded.
        if sparsifier.step == 1 and all(bool(part.mask.all()) for _, part in sparsifier.each(Mask)):
            warnings.warn(
                "FixedMask: no weight was zero when the model was sparsified, so it is trained dense. Load the sparse "
                "weights before sparsify_(), or with sparing.load_dense_state_dict()",
                SparsityWarning,
                stacklevel=2,
            )
