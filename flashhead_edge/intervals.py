"""How sure a measured share is."""

from __future__ import annotations

import math

from flashhead_edge.errors import SettingsError

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a share, 95 % by default.

    Raises:
        SettingsError: n is not positive, or successes are not between 0 and n.
    Source: Wilson, JASA 22 (1927).
    """
    if n < 1 or not 0 <= successes <= n:
        raise SettingsError(f"Wilson interval: {successes} of {n}, expected at least one trial and 0 to n successes; measure at least one position")
    share, square = successes / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    # rounding may put an end a hair inside the share itself, at 0 and at 1
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def least_trials(share: float) -> int:
    """Trials at which the lower end of the Wilson interval reaches `share` when all succeed."""
    return math.ceil(Z95 * Z95 * share / (1 - share))


def allowed_misses(n: int, share: float) -> int:
    """Misses among n at which the lower end of the Wilson interval still reaches `share`; -1 where none does."""
    low, high = -1, n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if wilson(n - middle, n)[0] >= share else (low, middle - 1)
    return low
