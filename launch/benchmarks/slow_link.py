"""A link between ranks that takes its time: no exchange is there sooner than so long after issue.

Ranks on one machine exchange through its memory in next to no time. With this, whoever waits for an
exchange of value tables sooner than `delay` after its issue waits for the rest of it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from ultramem_megatron.communication import exchange


@contextmanager
def slow_link(
    delay: float,
    now: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Within it, exchanges take `delay` seconds. now, sleep: the clock; tests bring their own."""
    issue = exchange._OneWay.issue

    def issue_late(transfer: Any, x: Tensor) -> None:
        issue(transfer, x)
        if transfer.work is not None:
            transfer.work = _LateWork(transfer.work, now() + delay, now, sleep)

    with mock.patch.object(exchange._OneWay, "issue", issue_late):
        yield


class _LateWork:
    """A `dist.Work` that is not done before its time."""

    def __init__(
        self, work: Any, arrival: float, now: Callable[[], float], sleep: Callable[[float], None]
    ) -> None:
        self._work, self._arrival, self._now, self._sleep = work, arrival, now, sleep

    def wait(self) -> None:
        self._work.wait()
        self._sleep(max(0.0, self._arrival - self._now()))
