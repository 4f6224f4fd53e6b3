"""What a preset is: settings that say where they are from, in three parts.

The paper's own table of model settings was not available to us. What it does not state in its
other tables and text is reconstructed from its parameter and FLOP columns, or assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

Value = str | int | float | bool


class Source(StrEnum):
    """Where a setting is from. The first two are known, the others are not."""

    PAPER = "paper"
    CODE = "code"
    INFERRED = "inferred"
    ASSUMED = "assumed"


SOURCES: dict[Source, str] = {
    Source.PAPER: "known: stated in the paper (arXiv 2411.12364 or 2508.18756)",
    Source.CODE: "known: the authors' published code",
    Source.INFERRED: "reconstructed from the paper's parameter and FLOP columns",
    Source.ASSUMED: "stated nowhere; a usual choice",
}


class Setting(NamedTuple):
    """One value and its source."""

    value: Value
    source: Source


Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Preset:
    """A model of the paper; names are Python's (`num_layers`), flags follow from them."""

    about: str
    """Which table it stands in."""
    model: Settings
    """Megatron's own model flags."""
    training: Settings
    """Megatron's training flags, but for data, micro-batch size and layout."""
    memory: Settings = field(default_factory=dict)
    """Fields of UltraMemConfig, spans as text; empty for dense and MoE."""


def paper(**values: Value) -> dict[str, Setting]:
    """Settings that the paper states."""
    return _from(Source.PAPER, values)


def code(**values: Value) -> dict[str, Setting]:
    """Settings of the authors' published code."""
    return _from(Source.CODE, values)


def inferred(**values: Value) -> dict[str, Setting]:
    """Settings with which the paper's columns come out."""
    return _from(Source.INFERRED, values)


def assumed(**values: Value) -> dict[str, Setting]:
    """Settings that we chose."""
    return _from(Source.ASSUMED, values)


def _from(source: Source, values: Mapping[str, Value]) -> dict[str, Setting]:
    return {name: Setting(value, source) for name, value in values.items()}
