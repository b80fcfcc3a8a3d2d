"""Which source the next sample comes from: a short repeating pattern, so that any cursor is found at once.

The weights are rounded to whole shares of a period and dealt out by smooth weighted round-robin, which
spreads each source as evenly as its share allows. Each source then repeats at its own pace.
"""

import math
from collections.abc import Sequence

import numpy as np

FINEST_SHARE = 10_000  # a weight is honoured to one part in this many


class Mixture:
    """Deals global cursors to sources in proportion to `weights`."""

    def __init__(self, weights: Sequence[float]) -> None:
        shares = _whole_shares(weights)
        self.shares = shares
        self._period = sum(shares)
        self._pattern: list[int] = []
        self._before: list[int] = []  # how often the pattern's source came earlier in the period
        credit, seen = np.zeros(len(shares), dtype=np.int64), [0] * len(shares)
        for _ in range(self._period):
            credit += shares
            source = int(np.argmax(credit))
            credit[source] -= self._period
            self._pattern.append(source)
            self._before.append(seen[source])
            seen[source] += 1

    def locate(self, cursor: int) -> tuple[int, int]:
        """The source of the sample at `cursor`, and how many samples that source gave before."""
        periods, phase = divmod(cursor, self._period)
        source = self._pattern[phase]
        return source, periods * self.shares[source] + self._before[phase]


def _whole_shares(weights: Sequence[float]) -> list[int]:
    total = math.fsum(weights)
    exact = [weight / total * FINEST_SHARE for weight in weights]
    shares = [max(1, round(share)) for share in exact]
    divisor = math.gcd(*shares)
    return [share // divisor for share in shares]
