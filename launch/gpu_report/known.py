"""What a row stands beside: the target, the floor, and what one H200 showed on 2026-11-26.

By the words of the row. Commit 6091ab5, driver 580, torch 2.11, triton 3.6: launch/results/h200.
"""

from typing import NamedTuple


class Known(NamedTuple):
    """Numbers in the row's unit; words say of a target which side is good."""

    h200: float | None = None
    target: str = ""
    floor: float | None = None


KNOWN = {
    "lookup forward, 1.6B shape, T 8192": Known(546, "<= 386", 347),
    "lookup forward, 1.6B shape, T 64": Known(28, "<= 10", 2.7),
    "lookup forward and backward, 1.6B shape, T 8192": Known(3253, "<= 2586", 1886),
    "lookup forward, 227M shape, T 8192": Known(503, "<= 245", 240),
    "side top-m forward, 1.6B shape, T 8192": Known(2379, "<= 650"),
    "side top-m forward and backward, 1.6B shape, T 8192": Known(5301, "<= 1750"),
    "side top-m forward, keys a multiple of 64, T 8192": Known(700),
    "grid top-m forward, 1.6B shape, T 8192": Known(118),
    "query convolution forward and backward, width 2048, T 8192": Known(1800, "<= 120", 40),
    "layer forward and backward, preset, T 8192": Known(12017, "<= 5400", 3600),
    "layer forward and backward, no convolution, T 8192": Known(10075),
    "layer forward and backward, aligned keys, no convolution, T 8192": Known(6854),
    "launches, preset, T 8192": Known(186, "<= 60"),
    "host waits, preset, T 8192": Known(2, "0"),
    "training, ultramem over dense, tokens per second": Known(0.73, ">= 0.9"),
    "training, pkm over dense, tokens per second": Known(0.92),
    "training, moe over dense, tokens per second": Known(0.31),
    "decode, dense in a CUDA graph, batch 64": Known(3.30),
    "decode, moe-grouped in a CUDA graph, batch 64": Known(18.85),
    "decode, ultramem in a CUDA graph, batch 64": Known(4.49),
    "decode, MoE (grouped) over UltraMem, batch 64": Known(4.2, ">= 5.2"),
    "decode, UltraMem over dense, batch 64": Known(1.36, "<= 1.10"),
    "decode, all memories, batch 64": Known(1.19, "<= 0.35"),
    "copy bandwidth": Known(4230),
    "matrix product, bfloat16": Known(801),
}
"""Both passes: the sum of the two, which were timed alone. Decoding: by a script, in CUDA graphs,
without rotary positions (launch/results/h200/decode_graphs.jsonl)."""
