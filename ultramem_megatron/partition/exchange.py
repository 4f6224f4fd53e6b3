"""Collectives of the memory-table group, differentiable, counted, and named when they fail.

Thin over torch.distributed. A failing collective (a dead or late rank) raises with its own name and
the ranks of the group, where the backend's message names neither.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_counters: list[dict[str, int]] = []


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


def _count(purpose: str, received_bytes: int) -> None:
    for counter in _counters:
        counter[purpose] = counter.get(purpose, 0) + received_bytes


def _collective(purpose: str, group: Any, run: Callable[[], Any]) -> None:
    try:
        with torch.profiler.record_function(f"ultramem::{purpose}"):
            run()
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        raise RuntimeError(
            f"Memory-table exchange of {purpose} failed on rank {dist.get_rank()} in the group of "
            f"ranks {ranks}: a rank of it has died, hangs, or is in another step. {error}"
        ) from error


def gather_tokens(x: Tensor, group: Any, purpose: str) -> Tensor:
    """Concatenation of every rank's (T, ...) along the first axis; equal T, no gradient."""
    size = group.size()
    out = x.new_empty(size * x.shape[0], *x.shape[1:])
    x = x.contiguous()
    _collective(purpose, group, lambda: dist.all_gather_into_tensor(out, x, group=group))
    _count(purpose, (size - 1) * x.numel() * x.element_size())
    return out


def all_to_all(
    x: Tensor,
    group: Any,
    purpose: str,
    send_sizes: Sequence[int] | None = None,
    receive_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Rows of x to their ranks; differentiable. Without sizes x is cut into P equal parts."""
    out: Tensor = _AllToAll.apply(x, group, purpose, send_sizes, receive_sizes)
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, purpose, send_sizes, receive_sizes):  # type: ignore[no-untyped-def]
        ctx.exchange = (group, purpose, send_sizes, receive_sizes)
        return _exchange(x, group, purpose, send_sizes, receive_sizes)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        group, purpose, send_sizes, receive_sizes = ctx.exchange
        back = _exchange(grad, group, f"{purpose} gradient", receive_sizes, send_sizes)
        return back, None, None, None, None


def _exchange(
    x: Tensor,
    group: Any,
    purpose: str,
    send_sizes: Sequence[int] | None,
    receive_sizes: Sequence[int] | None,
) -> Tensor:
    x = x.contiguous()
    rows = x.shape[0] if receive_sizes is None else sum(receive_sizes)
    out = x.new_empty(rows, *x.shape[1:])
    _collective(
        purpose,
        group,
        lambda: dist.all_to_all_single(
            out,
            x,
            list(receive_sizes) if receive_sizes is not None else None,
            list(send_sizes) if send_sizes is not None else None,
            group=group,
        ),
    )
    own = rows // group.size() if receive_sizes is None else receive_sizes[group.rank()]
    _count(purpose, (rows - own) * x.shape[1:].numel() * x.element_size())
    return out
