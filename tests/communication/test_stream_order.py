"""Overlap as streams order it on a GPU: what is read has been written, and no layer waits."""

import sys
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from tests.ranks import run_on_ranks

_WAITS = {
    "the branch for its input": (
        ("branch.py", "__init__", "wait_stream"),
        "aten::mm on branch does not wait for aten::native_layer_norm on layers",
    ),
    "the layers for the result": (
        ("branch.py", "join", "wait_stream"),
        "aten::add.Tensor on layers does not wait for aten::mm on branch",
    ),
    "memory of the input for the branch": (
        ("branch.py", "__init__", "record"),
        "memory of layers is given back while aten::mm on branch may use it",
    ),
    "memory of the result for the layers": (
        ("branch.py", "join", "record"),
        "memory of branch is given back while aten::add.Tensor on layers may use it",
    ),
    "a reduction for the layers": (
        ("gradient_streams.py", "start_grad_sync", "wait_stream"),
        "aten::mul_.Tensor on branch does not wait for aten::add_.Tensor on DDP",
    ),
}
"""Where each wait is, and what is out of order without it."""


def _deaf_at(place):
    """As if a line of ours were not there: the call of this file and function does nothing."""
    from tests.stream_checker import Stream, StreamChecker

    file, function, call = place
    owner = Stream if call == "wait_stream" else StreamChecker
    original = getattr(owner, call)

    def unless_from_there(*args):
        frame = sys._getframe(1)
        if call == "record":  # behind the mode that sees it
            frame = frame.f_back
        code = frame.f_code
        if (Path(code.co_filename).name, code.co_name) != (file, function):
            original(*args)

    return patch.object(owner, call, unless_from_there)


class _Run(NamedTuple):
    """Of two steps of two micro-batches."""

    errors: list[str]
    """What is out of order."""
    waited: list[int]
    """For how many operations of a backward's branch the first layer's MLP waited."""
    own_nodes: int
    """Of parameters whose gradients are added on the branch's stream, those DDP has found."""
    on_branch: int
    """Operations there."""


def _train(partition, own_streams=True, overlapped_reduction=True):
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from launch.benchmarks.memory_block import BlockShape, build, inputs
    from tests.stream_checker import Stream, StreamChecker
    from ultramem_megatron.communication import branch
    from ultramem_megatron.megatron.layer import memory_submodule
    from ultramem_megatron.memory.spans import Span
    from ultramem_megatron.patches.doors.gradient_streams import streams

    sizes = {"layers": 4, "hidden_size": 32, "sequence": 8, "num_keys": 16, "topk": 4}
    shape = BlockShape(**sizes, span=Span(1, 4), partition=partition)
    checker, beside, adding = StreamChecker(), Stream("branch"), Stream("DDP")
    waited, begun = [], []
    own = beside if own_streams else None
    with checker.checking(), patch.object(branch, "stream_beside", lambda _device: beside):
        with patch.object(memory_submodule, "stream_beside", lambda _device: own):
            block = build(shape, overlap=True)
        settings = DistributedDataParallelConfig(
            overlap_grad_reduce=overlapped_reduction, bucket_size=20_000
        )
        with torch.cuda.stream(adding):  # as Megatron's training does, and waits
            model = DistributedDataParallel(block.config, settings, block)
        checker.layers.wait_stream(adding)
        found = sum(checker.stream_of(node) is beside for node in model.grad_accs)
        block.layers[0].mlp.linear_fc1.weight.register_post_accumulate_grad_hook(
            lambda _: waited.append(max(s.seen.get(beside, 0) for s in (adding, checker.layers)))
        )
        x, grad = inputs(shape, torch.device("cpu"))
        for _ in range(2):
            model.zero_grad_buffer()
            for last in (False, True):
                for group in model.bucket_groups + model.expert_parallel_bucket_groups:
                    group.is_last_microbatch = last
                out = model(x.clone().requires_grad_(), None)
                begun.append(beside.done)
                checker.backward(out, grad)
                del out
            model.finish_grad_sync()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.main_grad)
    assert found == sum(p in streams for p in block.parameters())
    beyond = [w - b for w, b in zip(waited, begun, strict=True)]
    return _Run(checker.errors, beyond, found, beside.done)


def _on_rank():
    from launch.benchmarks.memory_block import initialize

    initialize()
    runs = {
        "whole": _train("dimension"),
        "number-wise": _train("number"),
        "reduced after backward": _train("dimension", overlapped_reduction=False),
        "added by the layers": _train("dimension", own_streams=False),
    }
    for name, (place, _) in _WAITS.items():
        with _deaf_at(place):
            runs[name] = _train("dimension")
    return runs


def test_every_read_comes_after_what_it_reads_and_no_layer_waits():
    for runs in run_on_ranks(2, _on_rank, env={"ULTRAMEM_KERNELS": "torch"}):
        added_by_layers = runs.pop("added by the layers")
        for name in ("whole", "number-wise", "reduced after backward"):
            run = runs.pop(name)
            assert not run.errors, name
            assert max(run.waited) == 0, name
            assert run.own_nodes > 0
            assert run.on_branch > 1000
        assert not added_by_layers.errors
        assert min(added_by_layers.waited) > 0  # as it was: the MLP waits for the memory's backward
        assert runs.keys() == _WAITS.keys()
        for name, (_, said) in _WAITS.items():
            assert any(said in error for error in runs[name].errors), name
