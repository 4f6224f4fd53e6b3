"""What is to become of a value: LAYER:VALUE of a table, as fired.csv names it."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ultramem_megatron.errors import UltraMemError


class Edit(NamedTuple):
    """One row of the table that the memory of `layer` (counted from 1) reads."""

    layer: int
    value: int
    factor: float = 1.0
    """What the row is multiplied by; 0 switches it off."""
    source: int | None = None
    """The row whose values, and pre-values, it gets, of the same table; None: its own."""

    def __str__(self) -> str:
        """In words, for the model's card."""
        if self.source is not None:
            return f"layer {self.layer}, value {self.value}: replaced by value {self.source}"
        return f"layer {self.layer}, value {self.value}: times {self.factor:g}"


def parse_edits(zero: Iterable[str], scale: Iterable[str], replace: Iterable[str]) -> list[Edit]:
    """Of the words of --zero (1:17), --scale (1:17=0.5), --replace (1:17=33). UltraMemError."""
    edits = [Edit(*_value("--zero", word, word), factor=0.0) for word in zero]
    for word in scale:
        name, number = _halves("--scale", word, "a factor: 1:17=0.5")
        edits.append(Edit(*_value("--scale", word, name), factor=_factor(word, number)))
    for word in replace:
        name, number = _halves("--replace", word, "a value of the same table: 1:17=33")
        layer, value = _value("--replace", word, name)
        edits.append(Edit(layer, value, source=_value("--replace", word, f"{layer}:{number}")[1]))
    return edits


def check_edits(
    edits: Sequence[Edit], values: Mapping[int, int], holders: Mapping[int, str]
) -> None:
    """Raise UltraMemError for what is not there, or named twice.

    values: of each memory's table, by its layer. holders: what names that table.
    """
    for layer, *rest in edits:
        if layer not in values:
            raise UltraMemError(
                f"{layer}:{rest[0]}: layer {layer} has no memory. There are memories in layers "
                f"{', '.join(map(str, values))}."
            )
    for edit in edits:
        rows = [edit.value] if edit.source is None else [edit.value, edit.source]
        for row in rows:
            if row >= values[edit.layer]:
                raise UltraMemError(
                    f"{edit.layer}:{row}: the table of layer {edit.layer} has values 0 to "
                    f"{values[edit.layer] - 1}."
                )
    named = Counter((holders[edit.layer], edit.value) for edit in edits)
    for edit in edits:
        times = named[holders[edit.layer], edit.value]
        if times > 1:
            shared = f" {_readers(edit.layer, holders)}." if _readers(edit.layer, holders) else ""
            raise UltraMemError(
                f"{edit.layer}:{edit.value} is named {times} times. Name each value once.{shared}"
            )


def shared_edits(edits: Sequence[Edit], holders: Mapping[int, str]) -> list[str]:
    """Of edits of tables that several memories read: which layers they change, in words."""
    found = {holders[edit.layer]: _readers(edit.layer, holders) for edit in edits}
    return [f"{words}: all of them read what is changed." for words in found.values() if words]


def _readers(layer: int, holders: Mapping[int, str]) -> str:
    """The layers that read the same table as this one, if there are others, else nothing."""
    layers = [str(n) for n, holder in holders.items() if holder == holders[layer]]
    return f"Layers {', '.join(layers)} share their table" if len(layers) > 1 else ""


def _value(flag: str, word: str, name: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]+):([0-9]+)", name)
    if found is None:
        raise UltraMemError(f"{flag} {word}: a value is LAYER:VALUE, two numbers, as 1:17.")
    return int(found[1]), int(found[2])


def _halves(flag: str, word: str, wanted: str) -> tuple[str, str]:
    name, sign, number = word.partition("=")
    if not sign:
        raise UltraMemError(f"{flag} {word}: give the value and {wanted}.")
    return name, number


def _factor(word: str, number: str) -> float:
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise UltraMemError(f"--scale {word}: {number!r} is no factor. Give a number, as 0.5.")
    return factor
