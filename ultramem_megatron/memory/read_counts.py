"""How often each value of a table was read, in counters whose number does not grow with the table.

Up to MOST values each has a counter of its own, and figures are exact. Of a larger table, S values
spread evenly over it have one each, and the others share S more. From the former comes what is said
of values that are read now and then, from all together what is said of those that are read very
often: there, one value is nearly all that its counter counts. N values, R reads.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ultramem_megatron.kernels.read_statistics import Counting

MOST = 2**22  # counters of a memory, 16 MB; more values than any preset of the paper has
_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples are spread most evenly
_OFTEN = 16  # times the mean of a shared counter: below it, reads of several values blur


class Counters(NamedTuple):
    """own: counters of one value each, they come first. shared: those after them."""

    num_values: int
    own: int
    shared: int

    @property
    def number(self) -> int:
        """Of all counters."""
        return self.own + self.shared

    def of(self, rows: Tensor) -> Tensor:
        """The counter of each row, same shape, int64."""
        return self.counting().of(rows)

    def counting(self) -> Counting:
        """Which counter a read has, as kernels take it."""
        return Counting(self.num_values, self.own, self.shared, self._stride())

    def _stride(self) -> int:
        """Moves the values about without two meeting; reads lie in lines of the key grid."""
        stride = int(min(self.num_values, 2**62 // self.num_values) * _GOLDEN)  # no overflow
        while math.gcd(stride, self.num_values) != 1:
            stride += 1
        return stride


def counters(num_values: int, most: int = MOST) -> Counters:
    """For a table of so many values. most: counters that a rank may have."""
    if num_values <= most:
        return Counters(num_values, num_values, 0)
    return Counters(num_values, most // 2, most // 2)


class Sums(NamedTuple):
    """What figures are made of: scalars, to be added over parts of the counters."""

    used: Tensor
    """Own counters that are not zero."""
    often: Tensor
    """Reads of values that are read often, and sums over these of c log c and c^2."""
    seldom: Tensor
    """The same of the other own counters."""


def sums(counts: Tensor, first: int, kind: Counters, reads: float) -> Sums:
    """Of a part (n,) of a memory's counters, which starts at `first`. reads: R, of all parts."""
    own = torch.arange(first, first + len(counts), device=counts.device) < kind.own
    threshold = _OFTEN * max(1.0, reads / kind.shared) if kind.shared else 0
    often = counts > threshold
    count = counts.double()
    terms = torch.stack([count, torch.special.xlogy(count, count), count.square()])
    return Sums(
        (own & (counts > 0)).sum().double(), (terms * often).sum(1), (terms * (own & ~often)).sum(1)
    )


class Figures(NamedTuple):
    """Of the reads of one memory."""

    used: float
    """Share of values read at least once; above MOST values within 0.1 percentage points."""
    divergence: float
    """KL(reads || uniform), nats; above MOST values within 0.02, simulated."""
    squares: float
    """Sum over values of the squared number of reads."""


def figures(found: Sums, kind: Counters, reads: float) -> Figures:
    """From sums over all counters; four equal counts of four values give (1, 0, 4 c^2)."""
    used = float(found.used) / kind.own
    if not reads:
        return Figures(used, math.nan, 0.0)
    often, often_log, often_squares = found.often.tolist()
    seldom, seldom_log, seldom_squares = found.seldom.tolist()
    scale = (reads - often) / seldom if seldom else 0.0
    logs = (often_log + scale * seldom_log) / reads
    divergence = math.log(kind.num_values) - math.log(reads) + logs
    return Figures(used, divergence, often_squares + scale * seldom_squares)
