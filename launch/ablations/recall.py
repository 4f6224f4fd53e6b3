"""How many of a dictionary's definitions a model reproduces, word for word.

A definition is reproduced if, after "\\nheadword:", every token of it is the most likely next one,
given those before: then greedy sampling writes it. One forward pass tells.

B definitions in a batch, S tokens of the longest, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ultramem_megatron.data.own_folder import write_whole
from ultramem_megatron.errors import UltraMemError

BATCH = 64
DEFINITIONS = 1000  # of the corpus's; every k-th is taken


def write_dictionary(definitions: Path, folder: Path) -> None:
    """Writes evenly chosen lines of definitions.tsv as text to train on, `headword: definition`."""
    lines = definitions.read_text(encoding="utf-8").splitlines()
    chosen = lines[:: max(1, len(lines) // DEFINITIONS)][:DEFINITIONS]
    file = folder / "dictionary.txt"
    folder.mkdir(parents=True, exist_ok=True)
    # Each begins with a line break, so that the first of a piece looks like all others.
    text = "".join("\n" + line.replace("\t", ": ", 1) for line in chosen) + "\n"
    if file.exists() and file.read_text(encoding="utf-8", errors="replace") != text:
        raise UltraMemError(f"{file}: is not what is written there. Move it away.")
    write_whole(file, text)


def measure(run: Path, data: Path) -> dict[str, float]:
    """Shares for the model saved in run/checkpoints, for definitions it was trained on and not.

    Returns:
        recall: share of the training part's definitions reproduced whole; recall_tokens: share of
        their tokens that are the most likely; heldout, heldout_tokens: the same for the part that
        was kept for validation, which a model can only guess.
    """
    from ultramem_megatron.inference.loading import load_for_inference

    model, tokenizer, _ = load_for_inference(str(run / "checkpoints"))
    shares = {}
    for part, name in (("train", "recall"), ("valid", "heldout")):
        lines = list(whole_lines(data / part, tokenizer))
        right, total = _count(model, data / "tokenizer" / "tokenizer.json", lines)
        whole = sum(r == t for r, t in zip(right, total, strict=True))
        shares[name] = whole / len(lines)
        shares[name + "_tokens"] = sum(right) / sum(total)
    return shares


def whole_lines(dataset: Path, tokenizer: Any) -> Iterator[str]:
    """The whole definitions in a prepared data set; a piece may begin inside one."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = IndexedDataset(str(dataset))
    for index in range(len(documents)):
        text = tokenizer.detokenize(documents[index].tolist()[:-1])
        for line in text.split("\n")[1:]:
            if ": " in line:
                yield line


def _count(model: Any, tokenizer: Path, lines: Sequence[str]) -> tuple[list[int], list[int]]:
    """Right and all tokens of each definition."""
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(tokenizer))
    right: list[int] = []
    total: list[int] = []
    for start in range(0, len(lines), BATCH):
        batch = lines[start : start + BATCH]
        encodings = [fast.encode(f"\n{line}\n") for line in batch]
        given = [
            _token_of(encoding, len("\n") + line.index(": ")) + 1  # all up to the colon
            for encoding, line in zip(encodings, batch, strict=True)
        ]
        hits, counts = count_batch(model, [e.ids for e in encodings], given)
        right += hits
        total += counts
    return right, total


def _token_of(encoding: Any, character: int) -> int:
    """Number of the token that holds a character of the text."""
    return int(encoding.char_to_token(character))


def count_batch(
    model: Any, tokens: Sequence[Sequence[int]], given: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Of each row of tokens after the first `given`: how many are the likeliest, and how many."""
    import torch

    length = max(map(len, tokens))
    # Padding comes after all that counts, and attention is causal.
    tokens_BS = torch.tensor([[*row, *[0] * (length - len(row))] for row in tokens])
    positions_BS = torch.arange(length).expand_as(tokens_BS)
    later_SS = torch.ones(length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits_BSV = model(tokens_BS, positions_BS, later_SS[None, None])
    best_BS = logits_BSV.argmax(-1)
    hits, counts = [], []
    for row, first in enumerate(given):
        last = len(tokens[row])
        hits.append(int((best_BS[row, first - 1 : last - 1] == tokens_BS[row, first:last]).sum()))
        counts.append(last - first)
    return hits, counts
