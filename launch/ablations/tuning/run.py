"""Teaches one trained model the same new definitions in every way, and looks at it now and then."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launch.ablations.recall import whole_lines
from launch.ablations.tuning.definitions import Definitions, encode, known, losses, new_lines

if TYPE_CHECKING:  # Megatron is imported after it is patched, where the model is loaded
    from launch.ablations.tuning.methods import Method
    from ultramem_megatron.megatron.background_reads import BackgroundReads

NEW, BATCH, STEPS = 48, 16, 40  # definitions to learn, of them in a step, steps
LOOKED_AT = (5, 10, 20, 40)
CLIP = 1.0
_OLD = 64  # of the definitions known before; every k-th
_WINDOWS = 4  # of 128 tokens, in a batch of the background text: as many tokens as in a step
Sets = Mapping[str, Definitions]
Row = dict[str, Any]


def tune(run: Path, *, data: Path, definitions: Path, seed: int, steps: int = STEPS) -> Row:
    """What came of each method and rate, from the model saved in run/checkpoints.

    data: what it was trained on, which it may forget, and held-out definitions. The "courses" are
    rows of method, rate, step, and of the new, old and held-out definitions loss and recall.
    """
    from ultramem_megatron.inference.loading import load_for_inference

    model, tokenizer, args = load_for_inference(str(run / "checkpoints"))
    from launch.ablations.tuning.methods import METHODS, as_it_was

    vocabulary = data / "tokenizer" / "tokenizer.json"
    old = list(whole_lines(data / "train", tokenizer))
    sets = {
        "new": encode(new_lines(definitions, NEW), vocabulary),
        "old": encode(old[:: max(1, len(old) // _OLD)][:_OLD], vocabulary),
        "heldout": encode(list(whole_lines(data / "valid", tokenizer)), vocabulary),
    }
    background = _background(model, data / "train", args)
    start = _look(model, sets)
    found = []
    for method in METHODS:
        for rate in method.rates:
            found.append({"method": method.name, "rate": rate, "step": 0, **start})
            with as_it_was(model):
                found += _taught(model, method, rate, sets, background, seed, steps)
            print(found[-1], flush=True)
    return {"courses": found}


def _background(model: Any, prefix: Path, args: Any) -> "BackgroundReads":
    from ultramem_megatron.tools.count import count
    from ultramem_megatron.tools.evaluate.perplexity import read_stream
    from ultramem_megatron.tools.evaluate.windows import batches, count_windows

    stream = read_stream(str(prefix), args.padded_vocab_size)
    number = -(-count_windows(len(stream), args.seq_length) // _WINDOWS)
    every = batches(stream, args.seq_length, _WINDOWS)
    return count(model, every, number)


def _taught(
    model: Any,
    method: "Method",
    rate: float,
    sets: Sets,
    background: "BackgroundReads",
    seed: int,
    steps: int,
) -> Iterator[Row]:
    """A row for each step of LOOKED_AT. seed: of the order of definitions, and of LoRA's start."""
    torch.manual_seed(seed)
    order = torch.cat([torch.randperm(NEW) for _ in range(-(-steps * BATCH // NEW))])
    tuner = method.make(model, background, rate)
    trained = [p for group in tuner.optimizer.param_groups for p in group["params"]]
    for step, which in enumerate(order.split(BATCH)[:steps], start=1):
        model.train()
        batch = sets["new"].some(which)
        losses(model, batch)[0][batch.trained].mean().backward()
        tuner.before_step()
        torch.nn.utils.clip_grad_norm_([p for p in trained if p.grad is not None], CLIP)
        tuner.optimizer.step()
        tuner.optimizer.zero_grad()
        if step in LOOKED_AT or step == steps:
            yield {"method": method.name, "rate": rate, "step": step, **_look(model, sets)}


def _look(model: Any, sets: Sets) -> Row:
    found: Row = {}
    for name, definitions in sets.items():
        loss, share = known(model, definitions)
        found |= {f"{name}_loss": round(loss, 5), f"{name}_recall": round(share, 5)}
    return found
