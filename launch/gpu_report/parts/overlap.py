"""What --ultramem-overlap hides: exchanges between two GPUs; on one, the memory's own kernels."""

import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from launch.benchmarks.memory_block import BlockShape, build, initialize, inputs
from launch.benchmarks.trace import Interval, traced
from launch.gpu_report.parts.benchmarks import written
from launch.gpu_report.row import Row, attempted
from ultramem_megatron.memory.spans import Span

_LARGE = BlockShape(
    layers=4, span=Span(1, 4), hidden_size=2048, sequence=2048, batch=4, num_keys=1024, topk=42
)
_SMALL = BlockShape(layers=4, span=Span(1, 4), hidden_size=32, sequence=8, num_keys=16, topk=4)


def rows(large: bool) -> Iterator[Row]:
    """Each number of the benchmark's CSV, with two GPUs; how much of a branch is beside layers."""
    if large and torch.cuda.device_count() < 2:
        yield Row(what="overlap", value="left out: exchanges want two GPUs, here is one")
    else:
        flags = (
            "--steps 4 --delay-ms 0"
            if large
            else "--steps 1 --layers 4 --span 2:3 --tokens 32 --num-keys 32 --delay-ms 0"
        )
        yield from attempted("overlap", lambda: _numbers(flags))
    yield from attempted("branch beside layers", lambda: _beside_layers(large))


def _numbers(flags: str) -> Iterator[Row]:
    for row in written("overlap", flags):
        where = f"{row['partition']}-wise, overlap {row['overlap']}, delay {row['delay_ms']} ms"
        for name in ("step", "exposed"):
            yield Row(what=f"{name}, {where}", value=float(row[f"{name}_ms"]), unit="ms")


def _beside_layers(large: bool) -> Iterator[Row]:
    """Of one GPU and one backward: kernels of the branch, and the part of them beside others."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"  # with 1 no kernels run beside each other
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    device = initialize()
    for own, words in ((True, "added on the branch's stream"), (False, "added by the layers")):
        kernels = _kernels(_LARGE if large else _SMALL, device, own)
        if len(kernels) < 2:
            word = f"backward ran on {len(kernels)} streams" if large else "no GPU, no streams"
            yield Row(what=f"backward of a branch, gradients {words}", value=word)
            continue
        branch = min(kernels.values(), key=lambda ones: sum(one.length for one in ones))
        others = [one for ones in kernels.values() if ones is not branch for one in ones]
        total = sum(one.length for one in branch)
        what = f"backward of a branch, gradients {words}"
        yield Row(what=what, value=round(total, 1), unit="us")
        share = round(100 * beside(branch, others) / total, 1)
        yield Row(what=f"{what}, beside layers' kernels", value=share, unit="%")


def _kernels(
    shape: BlockShape, device: torch.device, own_stream: bool
) -> dict[int, list[Interval]]:
    """Of a backward under DDP, by stream."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from ultramem_megatron.megatron.layer.memory_submodule import TransformerMemory

    left_out = patch.object(TransformerMemory, "add_gradients_beside", lambda memory: None)
    with nullcontext() if own_stream else left_out:
        block = build(shape, overlap=True)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(block.config, ddp, block)
    x, grad = inputs(shape, device)
    mask = torch.ones(len(x), len(x), dtype=torch.bool, device=device).triu(1)[None, None]
    for _ in range(2):  # the first compiles
        output = model(x.clone().requires_grad_(), mask)
        if device.type == "cuda":
            torch.cuda.synchronize()
        trace = traced(partial(output.backward, grad))
    with tempfile.TemporaryDirectory() as folder:
        trace.export_chrome_trace(str(Path(folder) / "trace.json"))
        events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    found: dict[int, list[Interval]] = {}
    for event in events:
        if event.get("cat") == "kernel":
            one = Interval(event["name"], event["ts"], event["ts"] + event["dur"])
            found.setdefault(event["args"]["stream"], []).append(one)
    return found


def beside(ours: Sequence[Interval], others: Sequence[Interval]) -> float:
    """Microseconds of ours in which any of the others ran; ours do not overlap each other."""
    total = 0.0
    for one in ours:
        reached = one.start
        for other in sorted(others, key=lambda interval: interval.start):
            start, end = max(other.start, reached), min(other.end, one.end)
            if end > start:
                total, reached = total + end - start, end
    return total
