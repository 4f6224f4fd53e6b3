"""Train as `ultramem train` does, and write how long each step took.

    python -m launch.benchmarks.training_steps FILE <flags>

FILE becomes {"step": [seconds, ...], "optimizer": [...], "cpu": [...], "peak_bytes": ...}; a step
is Megatron's train_step: forward, backward, reduction of gradients, optimizer. Data and logging are
outside. "cpu" is what the process computed in each step. Of several ranks each has its FILE.RANK.
"""

import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ultramem_megatron.errors import exit_on_user_error


def _timed(
    function: Callable[..., Any], seconds: list[float], cpu: list[float] | None = None
) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        start, computed = time.perf_counter(), time.process_time()
        result = function(*args, **kwargs)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if cpu is not None:
            cpu.append(time.process_time() - computed)
        return result

    return run


def record(argv: Sequence[str]) -> dict[str, Any]:
    """Train with these flags; seconds of every step."""
    from megatron.training import training

    from ultramem_megatron.training.pretrain import main

    steps: list[float] = []
    optimizer: list[float] = []
    cpu: list[float] = []
    set_up = training.setup_model_and_optimizer

    @functools.wraps(set_up)
    def with_timed_optimizer(*args: Any, **kwargs: Any) -> Any:
        model, made, scheduler = set_up(*args, **kwargs)
        made.step = _timed(made.step, optimizer)
        return model, made, scheduler

    training.train_step = _timed(training.train_step, steps, cpu)
    training.setup_model_and_optimizer = with_timed_optimizer
    main(argv)
    return {"step": steps, "optimizer": optimizer, "cpu": cpu, "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    """Of the GPU, or of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    with exit_on_user_error():
        file = Path(sys.argv[1])  # training replaces sys.argv
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            file = file.with_name(f"{file.name}.{os.environ['RANK']}")
        file.write_text(json.dumps(record(sys.argv[2:])))
