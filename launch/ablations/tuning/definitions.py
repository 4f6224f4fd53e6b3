"""Definitions as batches, and how well a model knows them.

B definitions, S tokens of the longest, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launch.ablations.recall import BATCH, DEFINITIONS

LONGEST = 128  # tokens; what the model was trained on


class Definitions(NamedTuple):
    """tokens (B, S) int64, filled up with 0. trained, asked: (B, S-1) bool, targets that are
    learnt, and those after the headword and its colon.
    """

    tokens: Tensor
    trained: Tensor
    asked: Tensor

    def some(self, which: Tensor) -> "Definitions":
        """Those of these numbers."""
        return Definitions(*(part[which] for part in self))


class Known(NamedTuple):
    """loss: mean over the asked tokens, nats. recall: share of definitions reproduced whole."""

    loss: float
    recall: float


def new_lines(definitions: Path, number: int) -> list[str]:
    """Evenly chosen lines of definitions.tsv that `recall.write_dictionary` passes over."""
    lines = definitions.read_text(encoding="utf-8").splitlines()
    step = max(1, len(lines) // DEFINITIONS)
    known = {line.partition("\t")[0] for line in lines[::step][:DEFINITIONS]}
    others = [line for line in lines[step // 2 :: step] if line.partition("\t")[0] not in known]
    chosen = others[:: max(1, len(others) // number)][:number]
    return [line.replace("\t", ": ", 1) for line in chosen]


def encode(lines: Sequence[str], tokenizer: Path) -> Definitions:
    """`headword: definition` lines as they stand in the training text."""
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(tokenizer))
    encodings = [fast.encode(f"\n{line}\n") for line in lines]
    length = min(LONGEST, max(len(encoding.ids) for encoding in encodings))
    tokens = torch.zeros(len(lines), length, dtype=torch.int64)
    trained = torch.zeros(len(lines), length - 1, dtype=torch.bool)
    asked = torch.zeros_like(trained)
    for row, (encoding, line) in enumerate(zip(encodings, lines, strict=True)):
        ids = encoding.ids[:length]
        tokens[row, : len(ids)] = torch.tensor(ids)
        trained[row, : len(ids) - 1] = True
        asked[row, encoding.char_to_token(len("\n") + line.index(": ")) : len(ids) - 1] = True
    return Definitions(tokens, trained, asked)


def losses(model: Any, batch: Definitions) -> tuple[Tensor, Tensor]:
    """Of each target (B, S-1): its loss in nats, and whether it is the likeliest token."""
    inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
    size = inputs.shape[1]
    later = torch.ones(1, 1, size, size, dtype=torch.bool).triu(1)
    logits = model(inputs, torch.arange(size).expand_as(inputs), later)  # (B, S-1, V)
    found = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    return found, logits.argmax(-1) == targets


@torch.no_grad()
def known(model: Any, definitions: Definitions) -> Known:
    """Of a model, which is in evaluation mode afterwards."""
    model.eval()
    total, whole = 0.0, 0
    for which in torch.arange(len(definitions.tokens)).split(BATCH):
        batch = definitions.some(which)
        loss, right = losses(model, batch)
        total += float(loss[batch.asked].double().sum())
        whole += int((right | ~batch.asked).all(1).sum())
    return Known(total / int(definitions.asked.sum()), whole / len(definitions.tokens))
