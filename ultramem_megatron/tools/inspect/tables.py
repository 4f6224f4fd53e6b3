"""What was recorded, as lines of CSV."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ultramem_megatron.memory.retrieval.addresses import grid_counts
from ultramem_megatron.tools.inspect.reads import Reads


def fired(words: Sequence[str], reads: Reads, top: int) -> Iterator[dict[str, object]]:
    """For each token the `top` values with the highest scores."""
    best = reads.scores.topk(min(top, reads.scores.shape[1]), dim=1)
    for position, word in enumerate(words):
        for score, pick in zip(best.values[position], best.indices[position], strict=True):
            yield {
                "layer": reads.layer_number,
                "position": position,
                "token": word,
                "value": int(reads.values[position, pick]),
                "group": int(reads.groups[position, pick]),
                "score": round(float(score), 4),
            }


def shared(words: Sequence[str], reads: Reads, values: int) -> Iterator[dict[str, object]]:
    """For each of the most often read values, which tokens read it, the most frequent first.

    A value that a token reads twice (in two heads or groups) counts twice.
    """
    readers: dict[int, Counter[str]] = {}
    for word, row in zip(words, reads.values.tolist(), strict=True):
        for value in row:
            readers.setdefault(value, Counter())[word] += 1
    ranked = sorted(readers.items(), key=lambda item: (-item[1].total(), item[0]))
    for value, tokens in ranked[:values]:
        for token, count in tokens.most_common():
            yield {
                "layer": reads.layer_number,
                "value": value,
                "reads": tokens.total(),
                "token": token,
                "token_reads": count,
            }


def grid(reads: Reads) -> Iterator[dict[str, object]]:
    """The bins of the key grid that were read."""
    counts = grid_counts(reads.grid, reads.keys_per_side)
    for row, column in counts.nonzero().tolist():
        yield {
            "layer": reads.layer_number,
            "row_bin": row,
            "column_bin": column,
            "reads": int(counts[row, column]),
        }


def usage(tensorboard: Path) -> list[dict[str, object]]:
    """Every logged metric of the memories over training steps; empty where nothing was logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not tensorboard.is_dir():
        return []
    events = EventAccumulator(str(tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    lines: list[dict[str, object]] = []
    for tag in events.Tags()["scalars"]:
        group, _, rest = tag.partition("/")
        metric, _, layer = rest.partition("/layer-")
        if group == "ultramem" and layer:
            lines += [
                {"layer": int(layer), "metric": metric, "step": s.step, "value": s.value}
                for s in events.Scalars(tag)
            ]
    return lines
