"""The collectives between processes against their plain twin in one."""

import torch

from tests.ranks import init_gloo, run_on_ranks
from ultramem_megatron.communication.exchange import all_to_all, count_bytes, gather_tokens
from ultramem_megatron.communication.exchange_reference import (
    all_to_all_reference,
    gather_tokens_reference,
)

_SIZES = [[1, 2, 0], [0, 0, 3], [2, 0, 1]]  # rows that rank r sends to rank q


def _rows(rank, count):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def _exchange_on_rank():
    import torch.distributed as dist

    rank, size = init_gloo()
    group = dist.group.WORLD
    receive = [_SIZES[sender][rank] for sender in range(size)]
    x = _rows(rank, sum(_SIZES[rank])).requires_grad_()
    with count_bytes() as received:
        uneven = all_to_all(x, group, "rows", _SIZES[rank], receive).wait()
    (uneven * (rank + 1)).sum().backward()
    return {
        "gathered": gather_tokens(_rows(rank, 2), group, "tokens").wait(),
        "even": all_to_all(_rows(rank, size), group, "even").wait(),
        "uneven": uneven.detach(),
        "gradient": x.grad,
        "bytes": received["rows"],
    }


def test_collectives_equal_their_plain_twin():
    ranks = run_on_ranks(3, _exchange_on_rank)
    gathered = gather_tokens_reference([_rows(rank, 2) for rank in range(3)])
    even = all_to_all_reference([_rows(rank, 3) for rank in range(3)])
    uneven = all_to_all_reference([_rows(rank, sum(_SIZES[rank])) for rank in range(3)], _SIZES)
    for rank, found in enumerate(ranks):
        assert torch.equal(found["gathered"], gathered[rank])
        assert torch.equal(found["even"], even[rank])
        assert torch.equal(found["uneven"], uneven[rank])
        # A row's gradient comes back from the rank it went to, which multiplied by its number.
        to = torch.tensor([q + 1.0 for q in range(3) for _ in range(_SIZES[rank][q])])
        assert torch.equal(found["gradient"], to.double().unsqueeze(1).expand(-1, 2))
        others = sum(_SIZES[sender][rank] for sender in range(3) if sender != rank)
        assert found["bytes"] == others * 2 * 8


def test_worked_case_of_the_twin():
    a, b, c, d = torch.arange(4.0).unsqueeze(1)
    first, second = all_to_all_reference(
        [torch.stack([a, b, c]), torch.stack([d])], [[1, 2], [0, 1]]
    )
    assert first.flatten().tolist() == [0]
    assert second.flatten().tolist() == [1, 2, 3]
