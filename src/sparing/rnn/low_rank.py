"""Weight matrices of fixed low rank or learned rank.

    W = W₁ · W₂ᵀ                        fixed rank r: W₁ (out, r), W₂ᵀ (r, in)
    W = W₁ · diag(S(m, s)) · W₂ᵀ        learned rank r: the number of nonzero S(m, s)

S is the soft threshold with the learned parameter s. m is the weight of a separate module, a `Diagonal`, so it is
sparsified like any other layer: `sparsify_` with STR learns its threshold as in the paper, and every other method
can prune it too. For each zero of m, `compact_` removes a column of W₁ and a row of W₂ᵀ.

Reference: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020, the
section on low rank in recurrent networks. The code for this section was not released.
Deviation: W₁, m and W₂ are initialized with the singular value decomposition of the dense weight, so that the
network computes the same function as the full-rank network at the start of training.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparing.errors import InputError, check_sizes


class Diagonal(nn.Module):
    """Multiply the input elementwise by a weight m: y = x ⊙ m.

    m contains the singular values of a factorized weight matrix. Sparsifying m reduces the rank of the matrix.

    Args:
        values: initial value of m, (features,). The parameter has shape (1, features).

    Raises:
        InputError: values is not a floating-point tensor.

    Examples:
        >>> Diagonal(torch.tensor([2.0, 0.0]))(torch.ones(1, 2)).detach()
        tensor([[2., 0.]])
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else repr(values)
            raise InputError(f"Diagonal: values must be a floating-point tensor of shape (features,), got {got}")
        self.weight = nn.Parameter(values.detach().reshape(1, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def applications_of_parts(self, x: Tensor) -> Mapping[nn.Module, int]:
        """Return the applications of m, one per row of the input, for MAC counting."""
        return {self: x.shape[:-1].numel()}

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[1]}"


def is_diagonal(name: str, module: nn.Module) -> bool:
    """Select the diagonals of a model. A predicate for the argument `select` of `sparsify_`.

    Examples:
        >>> model = LowRankLinear(8, 4, learned_rank=True)
        >>> list(sparsify_(model, STR(init=-10.0), select=is_diagonal).layers)
        ['diagonal']
    """
    return isinstance(module, Diagonal)


class LowRankLinear(nn.Module):
    """Apply a linear map of low rank, with a weight in two factors.

        y = W₁ (W₂ᵀ x) + b                  fixed rank
        y = W₁ (m ⊙ (W₂ᵀ x)) + b            learned rank

    A layer of rank r has r (in + out) weights and MACs per row of the input, instead of in · out. m adds r.

    W₁ and W₂ are initialized with N(0, 0.1²), as in EdgeML. With `learned_rank`, a dense W is initialized with
    N(0, 0.1²), and W₁, m and W₂ with its singular value decomposition.

    Args:
        in_features: size of x, (..., in_features).
        out_features: size of y, (..., out_features).
        rank: rank r, or maximum rank with `learned_rank`. None is min(in, out). With rank 0, y = b.
        bias: add b.
        learned_rank: add m, which `sparsify_(model, ..., select=is_diagonal)` sparsifies.

    Raises:
        InputError: a size is less than 1; the rank is not an integer from 0 to min(in, out).

    Examples:
        >>> layer = LowRankLinear(32, 100, rank=9, bias=False)
        >>> sum(p.numel() for p in layer.parameters())
        1188
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        bias: bool = True,
        learned_rank: bool = False,
    ) -> None:
        super().__init__()
        check_sizes("LowRankLinear", in_features=in_features, out_features=out_features)
        full = min(in_features, out_features)
        rank = full if rank is None else rank
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= full:
            raise InputError(
                f"rank must be an integer from 0 to {full} for a weight of {out_features} × {in_features}, got {rank!r}"
            )
        self.in_features, self.out_features = in_features, out_features
        diagonal: Diagonal | None = None
        if learned_rank:
            left, values, right = truncated_svd(0.1 * torch.randn(out_features, in_features), rank)
            diagonal = Diagonal(values)
        else:
            left, right = 0.1 * torch.randn(out_features, rank), 0.1 * torch.randn(rank, in_features)
        bound = 1 / math.sqrt(in_features)
        self.right = linear_from(right)
        self.diagonal = diagonal
        self.left = linear_from(left, torch.empty(out_features).uniform_(-bound, bound) if bias else None)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """W₂ᵀ (r, in) and W₁ · diag(m) (out, r), in the order in which x is multiplied by them."""
        left: Tensor = self.left.weight
        return self.right.weight, left if self.diagonal is None else left * self.diagonal.weight

    @property
    def weight(self) -> Tensor:
        """The dense product W, (out_features, in_features)."""
        right, left = self.factors
        return left @ right

    @property
    def bias(self) -> Tensor | None:
        """The bias b, (out_features,), or None."""
        return self.left.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.right(x)
        if self.diagonal is not None:
            x = self.diagonal(x)
        return self.left(x)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of a matrix, truncated to a rank.

    Args:
        weight: matrix, (out, in).
        rank: number r of singular values, the largest ones.

    Returns:
        Left singular vectors (out, r), singular values (r,) and right singular vectors (r, in).

    Examples:
        >>> left, values, right = truncated_svd(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), rank=1)
        >>> values
        tensor([3.])
    """
    # torch.linalg.svd does not support half precision.
    full = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    left, values, right = torch.linalg.svd(full, full_matrices=False)
    factors = [factor.to(weight.dtype).contiguous() for factor in (left[:, :rank], values[:rank], right[:rank])]
    return factors[0], factors[1], factors[2]


def linear_from(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Build a Linear with the given weight (out, in) and bias (out,).

    Examples:
        >>> linear_from(torch.ones(3, 2))
        Linear(in_features=2, out_features=3, bias=False)
    """
    # A 1×1 layer on the meta device avoids random numbers, and the warning of nn.Linear about an empty weight.
    layer = nn.Linear(1, 1, bias=bias is not None, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
