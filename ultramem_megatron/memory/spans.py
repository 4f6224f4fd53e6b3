"""Spans `a:b`: the memory reads at layer a and its result is added after layer b (paper 2.3)."""

import itertools
import re
from typing import NamedTuple

from ultramem_megatron.errors import UltraMemError

FLAG = "--ultramem-spans"
_SPAN = re.compile(r"([0-9]{1,9})\s*:\s*([0-9]{1,9})")


class Span(NamedTuple):
    """Layers in the paper's 1-based numbering: input taken at `start`, result added after `end`."""

    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


def parse_spans(text: str, num_layers: int) -> tuple[Span, ...]:
    """Read `3:5/6:8/9:11`, or `full` for one memory in every layer (`1:1/2:2/...`).

    Raises UltraMemError when the text is not of this form, a layer is outside 1..num_layers, a span
    ends before it starts, or two spans share a layer (only one result may be pending at a time).
    """
    if text.strip() == "full":
        return tuple(Span(layer, layer) for layer in range(1, num_layers + 1))
    spans = tuple(_parse_span(part, text) for part in text.strip().split("/"))
    check_spans(spans, num_layers)
    return spans


def _parse_span(part: str, text: str) -> Span:
    found = _SPAN.fullmatch(part.strip())
    if found is None:
        raise UltraMemError(
            f"{FLAG} {text!r:.200}: {part!r:.80} is not a span. Write spans as start:end in "
            f"1-based layer numbers, joined by '/', for example 3:5/6:8/9:11, or 'full'."
        )
    return Span(int(found[1]), int(found[2]))


def check_spans(spans: tuple[Span, ...], num_layers: int) -> None:
    """Raise UltraMemError unless the spans lie in 1..num_layers, in order, sharing no layer."""
    shown = "/".join(map(str, spans))
    for span in spans:
        if not 1 <= span.start <= num_layers or not 1 <= span.end <= num_layers:
            raise UltraMemError(
                f"{FLAG} {shown}: span {span} leaves the model, which has layers 1 to {num_layers} "
                f"(--num-layers {num_layers}). Layers are counted from 1."
            )
        if span.start > span.end:
            raise UltraMemError(
                f"{FLAG} {shown}: span {span} ends before it starts. "
                f"Write it as {span.end}:{span.start}."
            )
    for before, after in itertools.pairwise(spans):
        if after.start <= before.end:
            raise UltraMemError(
                f"{FLAG} {shown}: spans {before} and {after} overlap. A span may start only after "
                f"the one before it has ended: start at layer {before.end + 1} or later."
            )


def span_covering(spans: tuple[Span, ...], layer_number: int) -> Span | None:
    """The span whose result is pending or added in this layer (start <= layer <= end), or None."""
    return next((span for span in spans if span.start <= layer_number <= span.end), None)
