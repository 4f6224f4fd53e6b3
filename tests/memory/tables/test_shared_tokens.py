"""Ranks that hold the same tokens read a share each; together as one rank that reads all."""

from typing import Any

import pytest
import torch

from tests.ranks import run_on_ranks
from ultramem_megatron.communication.pausing import run

N, E, P, C, V = 12, 4, 5, 2, 6


def _case(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    addresses = torch.randint(E * N, (tokens, P), generator=generator)
    return drawn(N, V), addresses, drawn(tokens, P, C), drawn(tokens, E, V)


def _read(reader: Any, tokens: int) -> dict[str, torch.Tensor]:
    table, addresses, scores, grad = _case(tokens)
    table.requires_grad_()
    scores.requires_grad_()
    pooled = run(reader.read(table, addresses, scores))
    pooled.backward(grad)
    assert table.grad is not None
    assert scores.grad is not None
    return {"pooled": pooled.detach(), "table": table.grad, "scores": scores.grad}


def _on_rank(tokens: int) -> dict[str, torch.Tensor]:
    import torch.distributed as dist

    from tests.ranks import init_gloo
    from ultramem_megatron.memory.tables.replicated import ReplicatedReader
    from ultramem_megatron.memory.tables.shared_tokens import SharedTokensReader

    init_gloo()
    whole = ReplicatedReader(N, E)
    shared = SharedTokensReader(whole, dist.group.WORLD)
    assert shared.pauses == whole.pauses + 1
    return _read(shared, tokens)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("tokens", [1, 7, 12])
def test_shares_together_are_the_whole(ranks: int, tokens: int) -> None:
    from ultramem_megatron.memory.tables.replicated import ReplicatedReader

    whole = _read(ReplicatedReader(N, E), tokens)
    shares = run_on_ranks(ranks, _on_rank, tokens)
    for share in shares:
        torch.testing.assert_close(share["pooled"], whole["pooled"], rtol=0, atol=1e-13)
        torch.testing.assert_close(share["scores"], whole["scores"], rtol=0, atol=1e-13)
    # Each rank's table has the gradient of what it read: the sum is that of all tokens, once.
    total = sum(share["table"] for share in shares)
    torch.testing.assert_close(total, whole["table"], rtol=0, atol=1e-13)
