"""Lookup-reduce in Triton: in the interpreter, and as machine code for GPUs that are not here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.kernels.compiled import compile_for

pytest.importorskip("triton", reason="Triton is for Linux")


def test_in_the_interpreter():
    checks = Path(__file__).with_name("interpreted_lookup.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(checks)],
        env={**os.environ, "TRITON_INTERPRET": "1", "ULTRAMEM_KERNELS": "triton"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


_POINTERS = {"rows": "*i64", "groups": "*i64"}
_SIXTEEN_BYTES = r"ld\.global\.v4\.b32|cp\.async\.cg\.shared\.global \[.*0x10"
_EIGHT_CODES = r"ld\.global\.v[24]\.b32|cp\.async\.c.\.shared\.global \[.*0x(8|10)"
_SIZE_TYPES = {"picks": "i32", "width": "i32", "slice_width": "i32"}


def _types(dtype, *, floats, **others):
    """Argument types: tables and gradients in `dtype`, scores and sums in float32."""
    return {**dict.fromkeys(floats, f"*{dtype}"), **_POINTERS, **_SIZE_TYPES, **others}


def _compile_pool(capability, dtype, tokens, slice_width, picks, groups, addresses=False, coded=""):
    """coded: what int8 codes stand for, or nothing; `slice_width` of them have one scale then."""
    import triton.language as tl

    from ultramem_megatron.kernels.lookup_reduce import triton_forward

    if dtype == "fp32":
        operands, sizes = tl.float32, triton_forward.block_sizes(2 * tokens, slice_width, groups)
    else:
        operands = {"bf16": tl.bfloat16, "fp16": tl.float16}[dtype]
        in_flight = triton_forward.CODES_IN_FLIGHT if coded else triton_forward.IN_FLIGHT
        shape = (2 * tokens, slice_width, picks, groups)
        sizes = triton_forward.tensor_core_sizes(*shape, in_flight)
    types = _types(dtype, floats=("table", "out"), scores="*fp32", cores="i32", num_groups="i32")
    types |= {"table": "*i8", "scales": "*fp32"} if coded else {"scales": f"*{dtype}"}
    constants = {"PRECISE": tl.float32, "OPERANDS": operands, "ADDRESSES": addresses, **sizes}
    constants["FORMAT"] = coded
    loose = dict.fromkeys(("num_rows", "of_core", "of_scale", "num_scales"), "i32")
    return compile_for(capability, triton_forward.pool_kernel, types, constants, any_number=loose)


# Tokens, width of one of two cores' slices, picks, groups: 1.6B in training and decoding, the
# authors' 227M, many groups, a slice that blocks do not divide.
_SHAPES = [
    (8192, 512, 84, 4),
    (64, 512, 84, 4),
    (1, 512, 84, 4),
    (8192, 192, 160, 4),
    (8192, 512, 84, 16),
    (8192, 160, 84, 9),
    (8192, 512, 84, 64),
]


_COMPILED = [(capability, "bf16", shape) for capability in (80, 90, 100) for shape in _SHAPES]


@pytest.mark.parametrize(
    ("capability", "dtype", "shape"), [*_COMPILED, (90, "fp16", _SHAPES[0])], ids=str
)
def test_forward_on_tensor_cores_compiles(capability, dtype, shape):
    built = _compile_pool(capability, dtype, *shape)
    # That tile read at 90 % of a copy's speed on an H200 with 168 registers and 24 bytes spilled.
    assert built.spilled <= 24
    assert built.registers <= 210
    assert "mma.sync.aligned.m16n8k16" in built.ptx
    assert re.search(_SIXTEEN_BYTES, built.ptx)


_LONG = pytest.mark.long
_CODED_SHAPES = [
    (8192, 512, 84, 4),
    pytest.param((64, 512, 84, 4), marks=_LONG),
    pytest.param((8192, 64, 84, 4), marks=_LONG),
]


@pytest.mark.parametrize(
    "capability", [90, pytest.param(80, marks=_LONG), pytest.param(100, marks=_LONG)]
)
@pytest.mark.parametrize("coded", ["int8", "fp8"])
@pytest.mark.parametrize("shape", _CODED_SHAPES, ids=str)
def test_codes_are_read_eight_at_a_time_and_decoded_without_spills(capability, coded, shape):
    """A scale a row, for many tokens and few, and one for 64 values; for sums of either kind."""
    built = _compile_pool(capability, "bf16", *shape, coded=coded)
    assert built.spilled == 0
    assert built.registers <= 210
    assert "mma.sync.aligned.m16n8k16" in built.ptx
    assert re.search(_EIGHT_CODES, built.ptx)
    built = _compile_pool(capability, "fp32", *shape, coded=coded)
    assert built.spilled == 0
    assert built.registers <= 168
    assert re.search(_EIGHT_CODES, built.ptx)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("tokens", [1, 64, 128])
def test_addresses_are_taken_apart_without_spills(capability, tokens):
    """As decoding at 1.6B reads."""
    built = _compile_pool(capability, "bf16", tokens, 512, 84, 4, addresses=True)
    assert built.spilled == 0
    assert built.registers <= 210
    assert re.search(_SIXTEEN_BYTES, built.ptx)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("tokens", "slice_width", "groups"), [(8192, 512, 4), (8192, 192, 16), (8, 256, 1)]
)
def test_forward_compiles_to_vector_loads_without_spills(capability, tokens, slice_width, groups):
    built = _compile_pool(capability, "fp32", tokens, slice_width, 84, groups)
    assert built.spilled == 0
    assert built.registers <= 168  # three warps a scheduler
    assert re.search(_SIXTEEN_BYTES, built.ptx)
    assert "mul.wide.s64" in built.ptx or "mul.lo.s64" in built.ptx or "mad.lo.s64" in built.ptx


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [8192, 64])
def test_backward_compiles_to_vector_loads_and_atomics_without_spills(capability, dtype, tokens):
    import triton.language as tl

    from ultramem_megatron.kernels.lookup_reduce import triton_backward

    constants = {"PRECISE": tl.float32, "ADD_ROWS": True}
    constants |= triton_backward.picks_sizes(tokens, 84, 2, 512)
    counts = {"cores": "i32", "num_groups": "i32"}
    types = _types(dtype, floats=("grad", "table"), scores="*fp32", **counts)
    types |= {"target": "*fp32", "score_grad": "*fp32"}
    built = compile_for(capability, triton_backward.picks_kernel, types, constants)
    assert built.spilled == 0
    assert built.registers <= 168
    assert "ld.global.v4.b32" in built.ptx or "ld.global.v2.b32" in built.ptx
    if capability >= 90:  # vector atomics came with sm_90
        assert re.search(r"(red|atom).global.gpu.relaxed.add.v4.f32", built.ptx)  # Triton 3.9|3.6


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_sums_in_order_compile_to_vector_loads_without_spills(capability, dtype):
    import triton.language as tl

    from ultramem_megatron.kernels.lookup_reduce import triton_backward

    constants = {"PRECISE": tl.float32, **triton_backward.row_sizes(512)}
    counts = {"cores": "i32", "num_groups": "i32"}
    types = _types(dtype, floats=("grad",), scores="*fp32", target="*fp32", **counts)
    types |= {"row_n": "*i64", "order_n": "*i64", "count": "i32"}
    del types["rows"]
    built = compile_for(capability, triton_backward.sorted_rows_kernel, types, constants)
    assert built.spilled == 0
    assert built.registers <= 168
    assert "ld.global.v4.b32" in built.ptx
