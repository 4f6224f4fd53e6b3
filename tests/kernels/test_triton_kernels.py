"""Convolution and both top-m in Triton: interpreted, and compiled for GPUs that are not here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compiled import compile_for

pytest.importorskip("triton", reason="Triton is for Linux")


_CHECKS = (
    "test_adam_rows.py",
    "test_side_topk.py",
    "test_tucker_topk.py",
    "test_causal_convolution.py",
    "test_small_svd.py test_grid_shuffle.py test_rank_one_filter.py test_query_centring.py"
    " test_row_norm.py test_read_statistics.py test_paged_attention.py test_column_sums.py",
)


@pytest.mark.parametrize("checks", _CHECKS)
def test_in_the_interpreter(checks):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "triton", *checks.split()],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_convolution_compiles_to_vector_loads_without_spills(capability):
    import triton.language as tl

    from ultramem_megatron.kernels.causal_convolution import fused, triton_kernels

    names = ("x", "weight", "history", "out", "grad", "grad_x", "grad_history")
    types = {**dict.fromkeys(names, "*bf16"), "reach": "*i64", "partial": "*fp32", "mean": "*fp32"}
    types |= {"channels": "i32"}
    loose = dict.fromkeys(("rows", "shift", "parts"), "i32")
    kinds = {"TAPS": 5, "WITH_HISTORY": True, "WITH_REACH": True, "PRECISE": tl.float32}
    kinds |= {"WITH_MEAN": True, "WITH_SUMS": True}
    backward = {"TILES": fused.ROWS // fused.BACKWARD["BLOCK_R"], "SLOTS": 8, **fused.BACKWARD}
    for kernel, sizes, most in (
        (triton_kernels.forward_kernel, fused.FORWARD, 128),
        (triton_kernels.backward_kernel, backward, 224),
    ):
        own = {name: kind for name, kind in types.items() if name in kernel.arg_names}
        free = {name: kind for name, kind in loose.items() if name in kernel.arg_names}
        built = compile_for(capability, kernel, own, {**kinds, **sizes}, any_number=free)
        assert built.spilled == 0
        assert built.registers <= most
        assert "ld.global.v4.b32" in built.ptx
        assert "st.global.v4.b32" in built.ptx
    own = {name: types[name] for name in ("x", "weight", "history", "mean", "out", "channels")}
    sizes = {"TAPS": 5, "WITH_MEAN": True, "PRECISE": tl.float32, **fused.STEP}
    built = compile_for(
        capability, triton_kernels.step_kernel, own, sizes, any_number={"rows": "i32"}
    )
    assert built.spilled == 0
    assert built.registers <= 72
    assert "ld.global.v4.b32" in built.ptx


def test_what_is_small_compiles_without_spills():
    """Shuffle, decomposition, filter, running mean, sums of parts."""
    from ultramem_megatron.kernels.column_sums.triton_kernel import sums_kernel, sums_sizes
    from ultramem_megatron.kernels.grid_shuffle.triton_kernel import shuffle_kernel
    from ultramem_megatron.kernels.query_centring.triton_kernels import (
        add_parts_kernel,
        mean_kernel,
    )
    from ultramem_megatron.kernels.rank_one_filter.triton_kernel import filter_kernel
    from ultramem_megatron.kernels.small_svd.triton_kernel import jacobi_kernel

    pointers = {"addresses": "*i64", "tables": "*i32", "target": "*i64"}
    constants = {"ROUNDS": 4, "BLOCK": 512}
    loose = {"count": "i32", "side": "i32"}
    assert compile_for(90, shuffle_kernel, pointers, constants, any_number=loose).spilled == 0
    pointers = dict.fromkeys(("given", "left", "values", "right"), "*fp32")
    for size in (2, 3, 4):
        constants = {"SIZE": size, "BLOCK": 2 if size == 2 else 4, "SWEEPS": 10, "num_warps": 1}
        assert compile_for(90, jacobi_kernel, pointers, constants).spilled == 0
        own = {"cores": "*bf16", **dict.fromkeys(("u", "t", "values"), "*fp32")}
        constants["CORES"] = 2
        loose = {"next_core": "i32"}
        assert compile_for(90, filter_kernel, own, constants, any_number=loose).spilled == 0
    own = dict.fromkeys(("mean", "updates", "sums"), "*fp32")
    constants = {"MOMENTUM": 0.9, "BLOCK": 1024}
    assert compile_for(90, mean_kernel, own, constants, any_number={"channels": "i32"}).spilled == 0
    for kernel, own, loose, constants in (
        (add_parts_kernel, ("parts", "sums"), ("number", "count"), {"BLOCK_N": 128, "BLOCK_D": 32}),
        (sums_kernel, ("parts", "out"), ("count", "rows"), sums_sizes(129, 2048)),
        (sums_kernel, ("parts", "out"), ("count", "rows"), sums_sizes(8192, 16)),  # of the cores
    ):
        types = {**dict.fromkeys(own, "*fp32"), "width": "i32", "channels": "i32"}
        types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
        built = compile_for(90, kernel, types, constants, any_number=dict.fromkeys(loose, "i32"))
        assert built.spilled == 0
        assert "ld.global.v4.b32" in built.ptx


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("num_keys", "topk", "words"),
    [
        (3578, 42, 4),
        (2200, 42, 4),
        (1616, 80, 2),
        (1056, 128, 2),
        pytest.param(1138, 32, 4, marks=pytest.mark.long),
    ],
)
def test_side_top_m_compiles_to_vector_loads_without_spills(capability, num_keys, topk, words):
    """The keys of 1.6B, 151M and 227M, and UltraMemV2's: none is a multiple of 64."""
    from ultramem_megatron.kernels.side_topk.fused import select_sizes
    from ultramem_megatron.kernels.side_topk.triton_kernels import scatter_kernel, select_kernel

    pointers = {"scores": "*bf16", "directions": "*fp32", "indices": "*i64", "picked": "*fp32"}
    strides = ("by_rank", "by_query", "by_head", "by_side", "by_token", "width")
    loose = {"num_keys": "i32", "num_heads": "i32", "own_heads": "i32"}
    sizes = dict.fromkeys(strides, "i32")
    cases = [(2**15, 128), (256, 64)]  # of training, of decoding
    for programs, most in cases if capability == 90 else cases[:1]:
        constants = {"RANKS": 2, "TOPK": topk, **select_sizes(num_keys, topk, programs)}
        built = compile_for(
            capability, select_kernel, {**pointers, **sizes}, constants, any_number=loose
        )
        assert built.spilled == 0
        assert built.registers <= most
        assert f"ld.global.v{words}.b32" in built.ptx

    pointers = {"grad_picked": "*fp32", "indices": "*i64", "grad": "*bf16"}
    loose = {"num_heads": "i32", "own_heads": "i32"}
    slots = 1 << (topk - 1).bit_length()
    constants = {"RANKS": 2, "TOPK": topk, "SLOTS": slots, "BLOCK": 1024, "num_warps": 4}
    built = compile_for(
        capability, scatter_kernel, {**pointers, **sizes}, constants, any_number=loose
    )
    assert built.spilled == 0
    assert "st.global.v4.b32" in built.ptx


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("row", "width"), [(800, 400), (800, 800), (384, 192)])
def test_norms_compile_to_vector_loads_without_spills(capability, row, width):
    """Queries and keys of 1.6B, and keys of 227M."""
    from ultramem_megatron.kernels.row_norm.fused import ROWS, row_sizes
    from ultramem_megatron.kernels.row_norm.triton_kernels import norm_backward_kernel, norm_kernel

    pointers = dict.fromkeys(("x", "gain", "out", "grad", "grad_x"), "*bf16")
    strides = dict.fromkeys(("by_group", "by_side", "by_part", "by_block"), "i32")
    types = {**pointers, "partial": "*fp32", **strides}
    loose = dict.fromkeys(("rows", "parts", "slots", "sides", "group_blocks"), "i32")
    constants = {"EPS": 1e-5, "CENTRED": True, "TILE": ROWS, **row_sizes(row, width)}
    for kernel, most in ((norm_kernel, 64), (norm_backward_kernel, 128)):
        own = {name: kind for name, kind in types.items() if name in kernel.arg_names}
        built = compile_for(capability, kernel, own, constants, any_number=loose)
        assert built.spilled == 0
        assert built.registers <= most
        assert "ld.global.v4.b32" in built.ptx
        assert "st.global.v4.b32" in built.ptx


@pytest.mark.parametrize(("capability", "most"), [(80, 1), (90, 1), (90, 256), (100, 1)])
def test_paged_attention_compiles_without_spills(capability, most):
    """Two groups of eight heads, and one head a group, of width 128."""
    import triton.language as tl

    from ultramem_megatron.kernels.paged_attention import triton_kernel
    from ultramem_megatron.kernels.paged_attention.triton_kernel import attention_sizes

    pointers = dict.fromkeys(("query", "keys", "values", "sinks", "out"), "*bf16")
    pointers |= dict.fromkeys(("starts", "lengths", "blocks"), "*i32")
    pointers |= dict.fromkeys(("parts", "sums"), "*fp32")
    loose = dict.fromkeys(("blocks_stride", "tokens", "heads", "groups", "splits"), "i32")
    loose |= {"scale": "fp32"}
    more = {"BLOCK": 256, "WITH_SINKS": False, "OPERANDS": tl.bfloat16, "WINDOW": -1}
    for own_heads, kernel, split in (
        (8, triton_kernel.attention_kernel, {"SPLIT": False}),
        (8, triton_kernel.attention_kernel, {"SPLIT": True, "WINDOW": 500}),
        (1, triton_kernel.attention_kernel, {"SPLIT": False}),
        (8, triton_kernel.merge_kernel, {}),
    ):
        constants = {**more, **split, **attention_sizes(own_heads, 128, 128, 256, most)}
        names = {*kernel.arg_names, "num_warps"}
        of_kernel = [
            {name: kind for name, kind in all_of.items() if name in names}
            for all_of in (pointers | ({"out": "*fp32"} if split.get("SPLIT") else {}), constants)
        ]
        own_loose = {name: kind for name, kind in loose.items() if name in names}
        built = compile_for(capability, kernel, *of_kernel, any_number=own_loose)
        assert built.spilled == 0
        assert built.registers <= 255
        assert "ld.global.v4.b32" in built.ptx or "cp.async.cg" in built.ptx


@pytest.mark.parametrize(
    ("topk", "pairs", "capability"),
    [
        *((side, side, capability) for side in (42, 80, 128) for capability in (80, 90)),
        (128, 768, 90),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in ((128, 768, 80), (32, 32, 80), (32, 32, 90))
        ),
    ],
)
def test_grid_top_m_compiles_without_spills(topk, pairs, capability):
    """The last are UltraMemV2's: 768 pairs of 128 keys a side, and 32 of 32."""
    from ultramem_megatron.kernels.tucker_topk import fused, triton_kernels

    types = {"scores": "*fp32", "cores": "*bf16", "best_scores": "*fp32", "shuffle": "*i32"}
    types |= {"keys": "*i64", "addresses": "*i64", "positions": "*i32"}
    loose = {"keys_per_side": "i32", "num_heads": "i32"}
    constants = {"RANKS": 2, "CORES": 2, "TOPK": topk, "PAIRS": pairs}
    for rounds, programs in ((0, 2**14), (4, 128)):  # of training, where addresses are counted
        sizes = {"ROUNDS": rounds, **fused.grid_sizes(topk, pairs, programs)}
        kernel = triton_kernels.grid_kernel
        built = compile_for(capability, kernel, types, constants | sizes, any_number=loose)
        assert built.spilled == 0
        assert built.registers <= 255
    names = ("grad_best", "scores", "grad_scores", "grad_cores")
    types = {**dict.fromkeys(names, "*fp32"), "cores": "*bf16", "positions": "*i32"}
    sizes, loose = fused.backward_sizes(pairs), {"num_heads": "i32"}
    kernel = triton_kernels.grid_backward_kernel
    built = compile_for(capability, kernel, types, constants | sizes, any_number=loose)
    assert built.spilled == 0
    assert built.registers <= 168


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("columns", "warps"), [(64, 1), (1024, 4), (4096, 16)])
def test_rows_of_adamw_compile_without_spills_and_round_as_written(capability, columns, warps):
    from ultramem_megatron.kernels.adam_rows.triton_path import adam_rows_kernel

    names = ("values", "means", "squares", "grads", "numbers")
    types = {**dict.fromkeys(names, "*fp32"), "copies": "*bf16", "rows": "*i64", "current": "*i32"}
    types |= {"width": "i32"}
    constants = {"SLOTS": 1024, "COLUMNS": columns, "HAS_GRAD": True, "HAS_COPY": True}
    constants |= {"num_warps": warps, "enable_fp_fusion": False}
    built = compile_for(capability, adam_rows_kernel, types, constants, any_number={"count": "i32"})
    assert built.spilled == 0
    assert f"ld.global.v{2 if columns == 64 else 4}.b32" in built.ptx
    assert built.registers <= 128
    assert "sqrt.rn.f32" in built.ptx
    assert "div.rn.f32" in built.ptx
    # Each number: three a step without gradient, five in one with it.
    each = columns // (32 * warps)
    one, two = (len(re.findall(rf"fma\.rn\.{t}\s", built.ptx)) for t in ("f32", "f32x2"))
    assert one + 2 * two == 8 * each
    assert not re.search(r"\.(ftz|approx|full)\.", built.ptx)
