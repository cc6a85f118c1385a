"""How far weight decay alone takes the s of STR, and how much of it a sparsity takes.

Far below zero g'(s) is nothing, so the loss has no say and s only decays. One step of SGD with
momentum μ is v ← μ v + λ s, s ← s − η v; summed over many steps every λ s counts 1 / (1 − μ) times:

    s(t) ≈ s(0) · exp(−E(t)),      E(t) = λ · Σ η / (1 − μ)          the e-folds of the decay

as long as η λ is small beside (1 − μ)². AdamW multiplies s by (1 − η λ) beside its momentum, so there
E(t) = λ · Σ η.

Pruning can begin where g(s) reaches about 1e-3, for sigmoid and exp alike at s = −7: after
E₁ = ln(|s(0)| / 7) e-folds. What decay goes on to pull from there, against the loss, decides how
sparse the network becomes. For the 16 ResNet-50 rows of the paper, 79.55 % to 99.10 % and s(0) from
−100 to −12800, the e-folds left after the onset follow from the density alone,

    E − E₁ ≈ 0.75 · (1 − sparsity)^−0.85

to within 12 %; read the other way it gives the sparsity of every row to 1.3 points, and of those
above 90 % to 0.8. As shares c = E₁ / E the rows with s(0) = −3200 read 0.69 at 80 %, 0.52 at 90 % and
0.38 at 95 %.

Sources: the momentum sum is that of a geometric series. The rows are the appendix of Kusupati et al.,
ICML 2020, its weight decays and inits: those of 90.23 % were read in the released configuration, the
other fifteen are recalled, not read, and what is fitted to them inherits that.
"""

import math
from collections.abc import Iterable

from sparing.errors import InputError

ONSET = -7.0
"""The s at which pruning can begin: sigmoid(−7) = 0.0009."""


def e_folds(learning_rates: Iterable[float], weight_decay: float, momentum: float = 0.0) -> float:
    """E = λ · Σ η / (1 − μ): weight decay alone divides s by e this many times.

    Args:
        learning_rates: η of every step of the run.
        weight_decay: λ on s.
        momentum: μ of SGD; 0 for AdamW.

    Raises:
        InputError: the momentum is not in [0, 1).

    Examples:
        >>> round(e_folds([0.1] * 1000, 0.01, momentum=0.9), 6)
        10.0
    """
    if not 0 <= momentum < 1:
        raise InputError(f"momentum must be in [0, 1), got {momentum!r}")
    return weight_decay * math.fsum(learning_rates) / (1 - momentum)


def weight_decay_for(sparsity: float, learning_rates: Iterable[float], momentum: float, init: float) -> float:
    """The λ on s that takes a run to about a sparsity.

        λ = (ln(|init| / 7) + 0.75 · (1 − sparsity)^−0.85) · (1 − μ) / Σ η

    The rule was fitted to ResNet-50 on ImageNet under SGD, from 80 % to 99 %. A network with less to
    spare ends denser than was wished for, and one with more sparser. With AdamW (momentum=0) the
    decay is right, but its loss gradient on s is normalized, and the fit knows nothing of that.

    Args:
        sparsity: of all layers together, in (0, 1).
        learning_rates: η of every step of the run.
        momentum: μ of SGD.
        init: where s starts, below −7; the lower, the more of the run is over when pruning begins.

    Raises:
        InputError: a value is out of range; the run is so short that momentum would carry s past
            zero, which is where η λ > (1 − √μ)².

    Examples:
        >>> from sparing.schedules import warmup_cosine
        >>> rates = [0.256 * warmup_cosine(step // 5005, 100, 5) for step in range(100 * 5005)]
        >>> f"{weight_decay_for(0.9, rates, momentum=0.875, init=-3200):.2e}"  # the paper's row of 90.23 % has 2.25e-5
        '2.19e-05'
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
        raise InputError(f"sparsity must be a fraction between 0 and 1, got {sparsity!r}")
    if isinstance(init, bool) or not isinstance(init, (int, float)) or not -math.inf < init < ONSET:
        raise InputError(f"init must be below {ONSET:g}, where pruning begins, got {init!r}")
    rates = list(learning_rates)
    given = e_folds(rates, 1.0, momentum)
    if not 0 < given < math.inf:
        raise InputError(f"the learning rates of a run must sum to a positive number, got {sum(rates)!r}")
    decay: float = (math.log(init / ONSET) + 0.75 * (1 - sparsity) ** -0.85) / given
    # The step above has two real roots up to here; beyond, s oscillates around zero instead of creeping up to it.
    if decay * max(rates) > (1 - math.sqrt(momentum)) ** 2:
        raise InputError(
            f"{len(rates)} steps are too few for sparsity {sparsity:g} from init {init:g}: at the weight decay that "
            f"takes, {decay:.2g}, s would swing past zero; train longer, or start higher than {init:g}"
        )
    return decay
