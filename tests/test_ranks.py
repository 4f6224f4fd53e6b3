"""The helpers the multi-rank tests stand on."""

import os
import time

import pytest

from tests.ranks import RanksFailed, init_gloo, run_on_ranks


def _sum_of_ranks(start: float) -> tuple[int, float, str]:
    import torch

    rank, _ = init_gloo()
    total = torch.tensor([start + rank])
    torch.distributed.all_reduce(total)
    return rank, float(total), os.environ.get("A_VARIABLE", "unset")


def _raise_on_rank_1() -> None:
    import torch

    rank, _ = init_gloo()
    if rank == 1:
        print("last words of rank 1")
        raise KeyError("rank one has enough")
    torch.distributed.barrier()


def _hang_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(60)


def _exit_on_rank_0() -> None:
    if os.environ["RANK"] == "0":
        os._exit(7)


def test_results_come_back_in_order_of_rank() -> None:
    results = run_on_ranks(2, _sum_of_ranks, 10.0, env={"A_VARIABLE": "set"})
    assert results == [(0, 21.0, "set"), (1, 21.0, "set")]


def test_variables_of_one_call_do_not_reach_the_next() -> None:
    run_on_ranks(1, _sum_of_ranks, 0.0, env={"A_VARIABLE": "set"})
    assert run_on_ranks(1, _sum_of_ranks, 0.0) == [(0, 0.0, "unset")]


def test_an_exception_is_shown_with_rank_traceback_and_output() -> None:
    with pytest.raises(RanksFailed) as failure:
        run_on_ranks(2, _raise_on_rank_1)
    message = str(failure.value)
    # The cause comes first, although rank 0 fails as well when its partner has gone.
    assert message.startswith("rank 1 raised:")
    assert "rank one has enough" in message
    assert "_raise_on_rank_1" in message
    assert "last words of rank 1" in message


def test_a_hanging_rank_is_named_with_its_stack() -> None:
    with pytest.raises(RanksFailed, match=r"rank 1 was still running") as failure:
        run_on_ranks(2, _hang_on_rank_1, timeout=1.0)
    assert "in _hang_on_rank_1" in str(failure.value)
    assert "rank 0 was" not in str(failure.value)


def test_a_rank_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(RanksFailed, match="rank 0 died with exit code 7"):
        run_on_ranks(2, _exit_on_rank_0)
