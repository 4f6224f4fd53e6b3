"""What a run leaves for people to look at: curve, numbers, parameter counts.

Losses come from the TensorBoard events, not from the text log: they are the record that stays.
"""

import itertools
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultramem_megatron.data.own_folder import write_whole
from ultramem_megatron.tools.pictures import picture

LOSS, VALIDATION_LOSS = "lm loss", "lm loss validation"  # Megatron's tags
_WINDOW = 10  # steps of the running mean


@dataclass(frozen=True)
class Point:
    """One scalar: optimizer step, wall time in seconds since 1970, value."""

    step: int
    time: float
    value: float


@dataclass(frozen=True)
class Curves:
    """The losses of a run, one point per step, in nats per token."""

    train: list[Point]
    valid: list[Point]


def read_curves(folder: Path) -> Curves:
    """Reads the losses from TensorBoard events.

    Raises:
        ValueError: there are no training or no validation losses.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = set(events.Tags()["scalars"])
    if missing := {LOSS, VALIDATION_LOSS} - found:
        raise ValueError(f"no scalar named {sorted(missing)} in the events of {folder}")
    train, valid = (
        # Of two values for a step the later stands: a step is repeated when a run was resumed,
        # and evaluated twice when it is the last.
        list({s.step: Point(s.step, s.wall_time, s.value) for s in events.Scalars(tag)}.values())
        for tag in (LOSS, VALIDATION_LOSS)
    )
    return Curves(train, valid)


def tokens_per_second(curve: list[Point], tokens_per_step: int, resumed_at: int) -> float:
    """Typical training speed: the median step, which leaves out start-up, evaluation and saving.

    Args:
        curve: one point per step.
        tokens_per_step: tokens of all ranks together.
        resumed_at: the step after which the processes were started anew.

    Raises:
        ValueError: no two consecutive steps of the same processes.
    """
    seconds = [
        after.time - before.time
        for before, after in itertools.pairwise(curve)
        if after.step == before.step + 1 and before.step != resumed_at
    ]
    if not seconds:
        raise ValueError("a speed needs two consecutive steps")
    return tokens_per_step / statistics.median(seconds)


def count_parameters(checkpoint: Path) -> dict[str, int]:
    """Counts the trained numbers in a torch_dist checkpoint.

    Returns:
        "sparse": in value tables, of which a token reads a few rows; "dense": in all the rest;
        "total".
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from ultramem_megatron.memory.tables.value_table import names_a_table

    counts = {"dense": 0, "sparse": 0}
    entries = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    for name, entry in entries.items():
        # Megatron's parameters and ours are all called so, buffers are not.
        own = name.endswith(("weight", "bias")) or names_a_table(name)
        trained = own and not name.startswith("optimizer.")
        if trained and isinstance(entry, TensorStorageMetadata):
            counts["sparse" if names_a_table(name) else "dense"] += entry.size.numel()
    return {**counts, "total": sum(counts.values())}


def latest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and path of the newest complete checkpoint that Megatron saved below `folder`."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        return None
    step = int(tracker.read_text())
    return step, folder / f"iter_{step:07d}"


def plot(curves: Curves, unigram_entropy: float, resume_at: int, file: Path) -> None:
    """Draws both losses over steps, the unigram entropy and the step resumed from, as a PNG."""
    train, valid = ([(p.step, p.value) for p in c] for c in (curves.train, curves.valid))
    with picture(file, (8, 5)) as figure:
        axes = figure.subplots()
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.3, label="training")
        axes.plot(*_running_mean(train), color="tab:blue", label=f"mean of {_WINDOW} steps")
        axes.plot(*zip(*valid, strict=True), color="tab:red", marker="o", label="validation")
        axes.axhline(unigram_entropy, color="black", linestyle="--", label="unigram entropy")
        axes.axvline(resume_at, color="tab:green", linestyle=":", label="saved and resumed")
        axes.set(title="UltraMem GPT", xlabel="optimizer step", ylabel="loss (nats per token)")
        figure.legend(loc="outside lower center", ncols=3)


def _running_mean(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Steps, and means over each and the steps before it; at first over as many as there are."""
    values = [value for _, value in points]
    means = [statistics.fmean(values[max(0, i - _WINDOW) : i]) for i in range(1, len(values) + 1)]
    return [step for step, _ in points], means


def write_json(content: Mapping[str, Any], file: Path) -> None:
    """Writes JSON for people and programs, whole or not at all."""
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
