"""Collectives of the memory-table group: issued and waited for apart, differentiable, counted.

Each is issued by a function below and ends with `Transfer.wait()`. In backward the roles change:
the wait issues the collective that brings the gradient home, and the issue waits for it. Autograd
runs backward in the reverse order of forward, so what was computed between issue and wait has its
backward between them, too.

Profiler traces show "ultramem/issue scores", "ultramem/wait scores", "ultramem/issue scores
gradient" and so on. A failing collective (a dead or late rank) raises with its own name and the
ranks of the group, where the backend's message names neither.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_counters: list[dict[str, int]] = []

Start = Callable[[Tensor], tuple[Tensor, Any]]
"""Starts moving a tensor: where the result will be, and the `dist.Work` to wait for (None: is)."""


@contextmanager
def count_bytes() -> Iterator[dict[str, int]]:
    """Within it, bytes that this rank receives from others are added up by collective's purpose.

    with count_bytes() as received: layer(x)  # {"addresses": 1234, "values": 5678, ...}
    """
    counter: dict[str, int] = {}
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def gather_tokens(x: Tensor, group: Any, purpose: str) -> "Transfer":
    """Concatenation of every rank's (T, ...) along the first axis; equal T, no gradient."""
    return Transfer(x.detach(), group, purpose, _gather(group, purpose), _gather(group, purpose))


def gather_shares(x: Tensor, group: Any, purpose: str) -> "Transfer":
    """As gather_tokens, where all ranks go on alike: the gradient is each rank's share of its own.

    No rank sums what the others compute, since they compute the same.
    """
    return Transfer(x, group, purpose, _gather(group, purpose), _own_share(group))


def gather_and_sum(x: Tensor, group: Any, purpose: str) -> "Transfer":
    """As gather_tokens, with the gradient of each rank's own, summed over all ranks."""
    return Transfer(x, group, purpose, _gather(group, purpose), _reduce_scatter(group, purpose))


def take_share(x: Tensor, group: Any, purpose: str) -> "Transfer":
    """This rank's part of what all ranks hold alike; its gradient is gathered from all of them."""
    return Transfer(x, group, purpose, _own_share(group), _gather(group, f"{purpose} gradient"))


def all_to_all(
    x: Tensor,
    group: Any,
    purpose: str,
    send_sizes: Sequence[int] | None = None,
    receive_sizes: Sequence[int] | None = None,
) -> "Transfer":
    """Rows of x to their ranks. Without sizes x is cut into P equal parts."""
    there = _all_to_all(group, purpose, send_sizes, receive_sizes)
    back = _all_to_all(group, f"{purpose} gradient", receive_sizes, send_sizes)
    return Transfer(x, group, purpose, there, back)


class Transfer:
    """A collective under way, of which autograd knows."""

    def __init__(self, x: Tensor, group: Any, purpose: str, there: Start, back: Start) -> None:
        self._there = _OneWay(purpose, group, there)
        self._back = _OneWay(f"{purpose} gradient", group, back)
        self._token: Tensor = _Issue.apply(x, self._there, self._back)

    def wait(self) -> Tensor:
        """The result. On a GPU the current stream waits for it, the host does not."""
        out: Tensor = _Wait.apply(self._token, self._there, self._back)
        return out


class _OneWay:
    """One direction of a transfer. What moves is held here until it has arrived."""

    def __init__(self, purpose: str, group: Any, start: Start) -> None:
        self.purpose, self.group, self.start = purpose, group, start
        self.sent: Tensor | None = None
        self.result: Tensor | None = None
        self.work: Any = None

    def issue(self, x: Tensor) -> None:
        self.sent = x.contiguous()
        with self._named("issue"):
            self.result, self.work = self.start(self.sent)

    def wait(self) -> Tensor:
        with self._named("wait"):
            if self.work is not None:
                self.work.wait()
        result = self.result
        assert result is not None, "waited for what was not issued"
        self.sent = self.result = self.work = None
        return result

    @contextmanager
    def _named(self, action: str) -> Iterator[None]:
        try:
            with torch.profiler.record_function(f"ultramem/{action} {self.purpose}"):
                yield
        except RuntimeError as error:
            ranks = dist.get_process_group_ranks(self.group)
            raise RuntimeError(
                f"Memory-table exchange of {self.purpose} failed on rank {dist.get_rank()} in the "
                f"group of ranks {ranks}: a rank of it has died, hangs, or is in another step. "
                f"{error}"
            ) from error


class _Issue(torch.autograd.Function):
    """Issues; returns a token without elements, which ties the wait to it in autograd's graph."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        there.issue(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, _token):
        return ctx.back.wait(), None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, there, back):
        ctx.back = back
        return there.wait()

    @staticmethod
    def backward(ctx, grad):
        ctx.back.issue(grad)
        return grad.new_empty(0), None, None


def _gather(group: Any, purpose: str) -> Start:
    def start(x: Tensor) -> tuple[Tensor, Any]:
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        _count(purpose, out, len(x))
        return out, dist.all_gather_into_tensor(out, x, group=group, async_op=True)

    return start


def _reduce_scatter(group: Any, purpose: str) -> Start:
    def start(x: Tensor) -> tuple[Tensor, Any]:
        out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
        _count(f"{purpose} gradient", x, len(out))  # a ring brings each rank all but one part
        return out, dist.reduce_scatter_tensor(out, x, group=group, async_op=True)

    return start


def _own_share(group: Any) -> Start:
    def start(x: Tensor) -> tuple[Tensor, None]:
        return x.chunk(group.size())[group.rank()].clone(), None

    return start


def _all_to_all(
    group: Any, purpose: str, send_sizes: Sequence[int] | None, receive_sizes: Sequence[int] | None
) -> Start:
    send = None if send_sizes is None else list(send_sizes)
    receive = None if receive_sizes is None else list(receive_sizes)

    def start(x: Tensor) -> tuple[Tensor, Any]:
        rows = len(x) if receive is None else sum(receive)
        out = x.new_empty(rows, *x.shape[1:])
        _count(purpose, out, rows // group.size() if receive is None else receive[group.rank()])
        return out, dist.all_to_all_single(out, x, receive, send, group=group, async_op=True)

    return start


def _count(purpose: str, received: Tensor, own_rows: int) -> None:
    row_bytes = received.shape[1:].numel() * received.element_size()
    for counter in _counters:
        counter[purpose] = counter.get(purpose, 0) + (len(received) - own_rows) * row_bytes
