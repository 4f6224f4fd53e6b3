"""Reading and checking spans."""

import pytest

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.spans import Span, parse_spans, span_covering


def test_spans_are_read_in_the_papers_notation():
    assert parse_spans("3:5/6:8/9:11", 12) == (Span(3, 5), Span(6, 8), Span(9, 11))
    assert parse_spans(" 1:1 ", 1) == (Span(1, 1),)
    assert parse_spans("28:32", 32) == (Span(28, 32),)


def test_full_is_a_memory_in_every_layer():
    assert parse_spans("full", 3) == (Span(1, 1), Span(2, 2), Span(3, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a span"),
        ("3", "'3' is not a span"),
        ("3:", "is not a span"),
        ("3:5,6:8", "is not a span"),
        ("-1:2", "is not a span"),
        ("a:b", "is not a span"),
        ("3:5/", "'' is not a span"),
        ("\u0661:\u0662", "is not a span"),
        (f"1:{'9' * 5000}", r"9999\S* is not a span"),
        ("0:2", "span 0:2 leaves the model, which has layers 1 to 12"),
        ("9:13", "span 9:13 leaves the model"),
        ("5:3", "span 5:3 ends before it starts. Write it as 3:5"),
        ("3:6/5:8", "spans 3:6 and 5:8 overlap"),
        ("3:5/5:8", "start at layer 6 or later"),
        ("6:8/3:5", "spans 6:8 and 3:5 overlap"),
    ],
)
def test_wrong_spans_are_refused(text, message):
    with pytest.raises(UltraMemError, match=message):
        parse_spans(text, 12)


def test_lookup_by_layer():
    spans = parse_spans("3:5/6:8", 12)
    assert [span_covering(spans, layer) for layer in (2, 3, 5, 6, 9)] == [
        None,
        Span(3, 5),
        Span(3, 5),
        Span(6, 8),
        None,
    ]
