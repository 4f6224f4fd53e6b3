"""What a row stands beside: the target, the floor, what one H200 showed, and what is predicted.

By the words of the row. Measured on 2026-11-26 with commit 6091ab5, driver 580, torch 2.11, triton
3.6 (launch/results/h200). **Predicted** figures are nobody's measurement: what the changes since
then should give on the same card, from its own rows, from counts of launches and from bytes at the
share of a copy's speed that like kernels reached there. The comment above a row derives its figure.
"""

from typing import NamedTuple


class Known(NamedTuple):
    """Numbers in the row's unit; words say of a target which side is good."""

    h200: float | None = None
    target: str = ""
    floor: float | None = None
    predicted: float | None = None


KNOWN = {
    # Best of lookup_sweep.jsonl on tensor cores, whose sizes the kernel now has: 385.6, 9.7, 239.7.
    "lookup forward, 1.6B shape, T 8192": Known(546, "<= 386", 347, 386),
    "lookup forward, 1.6B shape, T 64": Known(28, "<= 10", 2.7, 9.7),
    "lookup forward, 227M shape, T 8192": Known(503, "<= 245", 240, 240),
    "the authors' lookup forward, 1.6B shape, T 8192": Known(446),
    "the authors' lookup forward, 1.6B shape, T 64": Known(10.8),
    "the authors' lookup forward, 227M shape, T 8192": Known(260),
    "the authors' lookup backward, 1.6B shape, T 8192": Known(2563),
    "the authors' lookup backward, 227M shape, T 8192": Known(1767),
    "lookup backward, 1.6B shape, T 8192": Known(2707),
    "lookup backward, 227M shape, T 8192": Known(2040),
    # Bytes: codes and scales of 688k picks 708 MB, sums 67, indices and scores 17: 187 us as copies
    # go. Compiled for sm_90 a warp runs 7.5 instructions (fp8: 8.5) for 32 codes, 165 (187)
    # million: at 4 for each of 132 multiprocessors and cycle of 1.75 GHz, 70 % of the time.
    "lookup of int8 codes, T 8192": Known(floor=187, predicted=255),
    "lookup of fp8 codes, T 8192": Known(floor=187, predicted=289),
    # Forward, and the sweep's 2,304 for the backward kernel's sizes; nothing is copied around it.
    "lookup forward and backward, 1.6B shape, T 8192": Known(3253, "<= 2586", 1886, 2690),
    # 3,584 keys as timed there: product 334; selection 365, which its instructions bounded, as the
    # 3,014 that a warp now runs to the 3,925 then (compiled for sm_90; rounds of its bisections
    # simulated, 9 for 15): 280. And the keys laid out: 35 MB, 12.
    # Floor: 188 GFLOP at 801 TFLOP/s and the scores (470 MB) read once; backward twice the product.
    "side top-m forward, 1.6B shape, T 8192": Known(2379, "<= 650", 345, 626),
    # That, and 1,173 for the backward with 3,584 keys, of which its products' copies of query,
    # gradient (105 MB moved each, 35) and keys (8) are gone; the keys' gradient cut: 15.
    "side top-m forward and backward, 1.6B shape, T 8192": Known(5301, "<= 1750", 924, 1736),
    "side top-m forward, keys a multiple of 64, T 8192": Known(700, predicted=614),
    "grid top-m forward, 1.6B shape, T 8192": Known(118, predicted=118),
    # 5 passes over 33.6 MB are 40 us of copying; the scatter kernel, which like this one streams
    # (470 MB in 157 us with aligned keys), reached 71 % of a copy: 56, and 5 for the weight's sums.
    "query convolution forward and backward, width 2048, T 8192": Known(1800, "<= 120", 40, 61),
    # Keys and values of two groups of width 128 read once: 34, 67 and 134 MB.
    "paged attention, decoding, batch 1, 32768 keys": Known(floor=7.9),
    "paged attention, decoding, batch 8, 8192 keys": Known(floor=15.9),
    "paged attention, decoding, batch 64, 2048 keys": Known(floor=31.7),
    # Device time with aligned keys and no convolution was 6,146 (kernels_and_layer.jsonl). Of it
    # are gone: copies of strided tensors 265; the query gradient's sum over heads 69; cast and
    # deviation of the output 90 (one read: 16); norms 278 (9 passes over 26 MB twice, at 71 % of
    # a copy's speed 78, and sums of parts 10: 107 with what a launch costs); lookup 545 -> 386 and
    # 2,419 -> 2,304; selection 365 -> 280; shuffle 18 int64 operations -> 3 kernels: 50; filter 6
    # kernels of the library's SVD and 25 more: 65. To it come 34 for the centring, and 5 launches
    # of 2 us.
    "layer forward and backward, aligned keys, no convolution, T 8192": Known(6854, predicted=5137),
    "layer forward and backward, no convolution, T 8192": Known(10075, predicted=5137),
    # Instead of these 44: the convolution, which centres in passing, 61, sums of its parts (17 MB)
    # 6, and two launches.
    "layer forward and backward, preset, T 8192": Known(12017, "<= 5400", 3600, 5164),
    # Counted on the meta device (tests/launch/launches.py): 34. The same count gave 95 where 107
    # were measured (no convolution; norms' backward and sums were several kernels).
    "launches, preset, T 8192": Known(186, "<= 60", None, 38),
    # In the same count a read on the host is an error: there is none.
    "host waits, preset, T 8192": Known(2, "0", None, 0),
    # Optimizer: unfused 106 bytes a parameter (8 passes of AdamW 80, clipping by copies 16, norm 4,
    # bf16 copy 6), fused and in place 46. Dense and UltraMem give 27.6 ps a parameter and 10.3 ms
    # besides (product keys fit: 57 for 56 measured): 46 bytes are 12.0 ps, so 12.4 and 34.7 ms.
    # The rest: dense 256.2; UltraMem 305.6, its 49.4 for memories times 5,164/12,017: 277.4.
    # (256.2 + 12.4) / (277.4 + 34.7); product keys, of 1,707e6 parameters: 268.6 / (238.1 + 30.8).
    "training, ultramem over dense, tokens per second": Known(0.73, ">= 0.9", None, 0.86),
    "training, pkm over dense, tokens per second": Known(0.92, predicted=1.0),
    "training, moe over dense, tokens per second": Known(0.31),
    "copy bandwidth": Known(4230),
    "matrix product, bfloat16": Known(801),
    # Of 1,111 us: projections 97 stay; lookup 149 -> 58; products 129 -> 91 and selection
    # 112 -> 71 as with 3,584 keys, then 58; convolution 156 -> 18, its history with it; grid 66,
    # shuffle and addresses 215 -> 78 in one kernel; copies and casts are gone. Of those six
    # selections 2 us each were launches, the rest 4.4 cycles for each of 3,190 instructions of
    # a warp; with 8 warps a program 1,600 of them: 36. So of the grid 3.5 cycles for each of 5,460,
    # with 4 warps of 2,440, and 0.8 us of barriers: 46. A norm, then PyTorch's (28), is 2 us and
    # 390 instructions: 18. The floor is their bytes.
    "decode, six memories, batch 64": Known(1111, "<= 350", 60, 364),
    # Counted (tests/inference/test_decode_launches.py): 8 a memory, and the layer's sum (43 seen).
    "launches of six memories in a decode step": Known(258, "<= 60", None, 54),
    # The same MoE (16.93, 18.85 ms) over dense (2.86, 3.30) and the 0.364 ms of the memories.
    "decode, grouped MoE over UltraMem, batch 32": Known(4.2, ">= 5.2", None, 5.3),
    "decode, grouped MoE over UltraMem, batch 64": Known(4.2, ">= 5.2", None, 5.1),
    "decode, UltraMem over dense, batch 32": Known(1.42, "<= 1.10", None, 1.13),
    "decode, UltraMem over dense, batch 64": Known(1.36, "<= 1.10", None, 1.11),
}
"""Both passes: the sum of the two, which were timed alone. Decoding (1.6B, 2 groups of keys and
values, CUDA graphs) was timed there by a script, without positions; launches, by its profile."""
