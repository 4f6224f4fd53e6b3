"""What overlap hides: the order of events in traces, and waiting counted on a clock of layers."""

import csv
from contextlib import nullcontext

import pytest

from tests.ranks import RanksFailed, init_gloo, run_on_ranks

_SMALL = {"hidden_size": 32, "sequence": 8, "num_keys": 7, "topk": 4}


def _block(partition, overlap):
    """A block with span 2:5 on this rank, and its inputs."""
    import torch.distributed as dist

    from launch.benchmarks import memory_block

    if not dist.is_initialized():
        memory_block.initialize()
    shape = memory_block.BlockShape(partition=partition, **_SMALL)
    import torch

    block = memory_block.build(shape, overlap=overlap)
    return block, memory_block.inputs(shape, torch.device("cpu"))


def _traced_events(partition, overlap):
    from launch.benchmarks import memory_block, trace

    block, inputs = _block(partition, overlap)
    with trace.marked_layers(block):
        found = trace.traced(lambda: memory_block.step(block, *inputs))
    names = [event.name for event in trace.events(found, trace.ISSUE, trace.WAIT, trace.LAYER)]
    return names, len(trace.transfers(found)), trace.exposed(found)


def _evaluate():
    import torch

    outputs = []
    for overlap in (False, True):
        block, (x, _) = _block("dimension", overlap)
        with torch.no_grad():
            outputs.append(block.eval()(x, torch.zeros(1, 1, len(x), len(x), dtype=torch.bool)))
    return torch.equal(*outputs) and bool(outputs[0].norm() > 0)


def test_evaluation_is_the_same():
    assert run_on_ranks(2, _evaluate) == [True, True]


def _order_of_parameters():
    """When a hook that gathers parameters, as Megatron's DDP has it, runs for the projection."""
    from launch.benchmarks import memory_block

    block, inputs = _block("dimension", True)
    order = []

    def gather(_module, *_):
        order.append("gather")

    gather.__module__ = "megatron.core.distributed"
    block.layers[1].memory.value_proj.register_forward_pre_hook(gather)
    block.layers[2].register_forward_pre_hook(lambda *_: order.append("layer 3"))
    memory_block.step(block, *inputs)
    return order


def test_parameters_are_gathered_before_the_branch_leaves_the_layers():
    # On a GPU only the stream that asks first waits for them.
    [order, _] = run_on_ranks(2, _order_of_parameters)
    assert order == ["gather", "layer 3", "gather"]


def _all_events():
    return {
        (partition, overlap): _traced_events(partition, overlap)
        for partition in ("dimension", "number")
        for overlap in (False, True)
    }


@pytest.fixture(scope="module")
def events():
    return run_on_ranks(2, _all_events)[0]


def _between(names, purpose):
    """Layers of which something ran between an exchange's issue and the wait for it."""
    start, end = (names.index(f"ultramem/{action} {purpose}") for action in ("issue", "wait"))
    assert start < end
    return {name.split()[1] for name in names[start:end] if name.startswith("layer")}


@pytest.mark.parametrize(
    ("partition", "purpose", "layers"),
    [
        # The issue is at the end of layer 2, the last join at the end of layer 5; half of the
        # boundaries belong to each of two exchanges, a third to each of three.
        ("dimension", "addresses", {"2", "3", "4"}),
        ("dimension", "scores", {"2", "3", "4"}),
        ("dimension", "pooled values", {"4", "5"}),
        ("dimension", "pooled values gradient", {"4", "5"}),
        ("dimension", "scores gradient", {"2", "3", "4"}),
        ("number", "sizes", {"2", "3"}),
        ("number", "addresses", {"3", "4"}),
        ("number", "pooled values", {"4", "5"}),
        ("number", "pooled values gradient", {"4", "5"}),
        ("number", "scores gradient", {"3", "4"}),
    ],
)
def test_layers_run_while_an_exchange_is_on_its_way(events, partition, purpose, layers):
    names, _, _ = events[partition, True]
    assert _between(names, purpose) == layers
    names, _, _ = events[partition, False]
    assert _between(names, purpose) == set()


def test_every_exchange_is_seen(events):
    assert {key[0]: found[1] for key, found in events.items()} == {"dimension": 5, "number": 7}
    assert all(found[2] > 0 for found in events.values())


def _exposed_ticks(partition, overlap, delay):
    """Ticks waited in a step. The clock ticks when a layer begins or ends, forward or backward, and
    advances by what is waited."""
    from unittest import mock

    from launch.benchmarks import memory_block, trace
    from launch.benchmarks.slow_link import slow_link

    block, inputs = _block(partition, overlap)
    clock = {"now": 0.0, "waited": 0.0}

    def tick(_event):
        clock["now"] += 1
        return nullcontext()

    def sleep(ticks):
        clock["now"] += ticks
        clock["waited"] += ticks

    with (
        mock.patch.object(trace, "record_function", tick),
        trace.marked_layers(block),
        slow_link(delay, now=lambda: clock["now"], sleep=sleep),
    ):
        memory_block.step(block, *inputs)
    return clock["waited"]


def _ticks_of_each(delays):
    return {
        (partition, overlap): [_exposed_ticks(partition, overlap, delay) for delay in delays]
        for partition in ("dimension", "number")
        for overlap in (False, True)
    }


def test_overlap_hides_what_layers_take():
    delays = [0, 2, 3, 9]
    [ticks, same] = run_on_ranks(2, _ticks_of_each, delays)
    assert ticks == same

    def exposed(*hidden):
        """Per delay: the sum over exchanges (those of one group count once) less what is hidden."""
        return [sum(max(0, delay - ticks) for ticks in hidden) for delay in delays]

    # Forward and backward mirror each other; number-wise sizes have no gradient.
    assert ticks["dimension", False] == exposed(0, 0, 0, 0)
    assert ticks["dimension", True] == exposed(4, 2, 2, 4)
    assert ticks["number", False] == exposed(0, 0, 0, 0, 0)
    assert ticks["number", True] == exposed(2, 2, 2, 2, 2)


def _run_command(folder):
    from launch.benchmarks import overlap

    overlap.main(
        [
            "--out",
            str(folder),
            "--plot",
            "--delay-ms",
            "0",
            "1",
            "--steps",
            "1",
            "--tokens",
            "8",
            "--hidden-size",
            "32",
            "--num-keys",
            "9",
            "--partition",
            "number",
        ]
    )


def test_command_leaves_table_picture_and_traces(tmp_path):
    run_on_ranks(2, _run_command, tmp_path)
    with open(tmp_path / "overlap.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["delay_ms"], row["overlap"]) for row in rows] == [
        ("0.00", "off"),
        ("0.00", "on"),
        ("1.00", "off"),
        ("1.00", "on"),
    ]
    assert all(float(row["step_ms"]) > 0 and row["torch"] and row["commit"] for row in rows)
    assert float(rows[2]["exposed_ms"]) >= 5  # five groups of exchanges, one millisecond each
    assert (tmp_path / "overlap.png").stat().st_size > 10_000
    assert "ultramem/wait sizes" in (tmp_path / "number_on.trace.json").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "1"], "--ranks 1: one rank exchanges nothing"),
        (["--delay-ms", "0", "-1"], "--delay-ms -1: it must be 0 or more"),
        (["--steps", "0"], "--steps 0: it must be at least 1"),
        (["--span", "1:2/3:4"], "--span 1:2/3:4: the block has one memory"),
        (["--span", "5:9"], "leaves the model"),
    ],
)
def test_wrong_flags(flags, message, tmp_path):
    from launch.benchmarks import overlap
    from ultramem_megatron.errors import UltraMemError

    with pytest.raises(UltraMemError, match=message):
        overlap.main(["--out", str(tmp_path), *flags])


def _lose_a_rank():
    import torch
    import torch.distributed as dist

    from ultramem_megatron.communication.exchange import all_to_all

    rank, _ = init_gloo()
    transfer = all_to_all(torch.ones(2), dist.group.WORLD, "scores")
    if rank == 1:
        raise SystemExit(1)
    transfer.wait()
    all_to_all(torch.ones(2), dist.group.WORLD, "pooled values").wait()


def test_a_lost_rank_is_named_by_the_wait():
    with pytest.raises(RanksFailed, match=r"exchange of (scores|pooled values) failed on rank 0"):
        run_on_ranks(2, _lose_a_rank)


def test_union_of_intervals():
    from launch.benchmarks.trace import covered

    assert covered([]) == 0
    assert covered([(4, 6), (0, 2), (1, 3), (5, 5.5)]) == 5
