"""The lookup behind pre-values in Triton: interpreted, and compiled for GPUs that are not here."""

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
    checks = Path(__file__).with_name("interpreted_prevalued.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(checks)],
        env={**os.environ, "TRITON_INTERPRET": "1", "ULTRAMEM_KERNELS": "triton"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


_TABLES = ("table", "pre_table", "x", "out", "grad")
_FLOATS = ("scores", "dots", "gates", "slopes", "target", "pre_target", "score_grad", "dot_grad")
_SIZES = ("picks", "width", "slice_width", "pre_width")
_SCALES = ("scales", "pre_scales")
_COUNTS = ("cores", "num_groups", "block", "pre_block", "num_scales", "pre_num_scales")


def _compile(capability, kernel, dtype, constants, coded=False):
    types = {**dict.fromkeys(_TABLES, f"*{dtype}"), **dict.fromkeys(_FLOATS, "*fp32")}
    types |= dict.fromkeys(_SCALES, "*fp32" if coded else f"*{dtype}")
    types |= dict.fromkeys(("table", "pre_table"), "*i8") if coded else {}
    types |= {"rows": "*i64", "groups": "*i64", "x_grad": "*fp32", **dict.fromkeys(_SIZES, "i32")}
    own = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    loose = {name: "i32" for name in _COUNTS if name in kernel.arg_names}
    return compile_for(capability, kernel, own, constants, any_number=loose)


# Tokens, picks, cores, width of a slice, of a pre-value, groups: UltraMemV2's 227M and 1B in
# training and decoding, PEER of width 2048, groups of values, slices that blocks do not divide.
_LONG = pytest.mark.long
_CAPABILITIES = [90, pytest.param(80, marks=_LONG), pytest.param(100, marks=_LONG)]
_SHAPES = [
    (8192, 32, 2, 96, 192, 1),
    (8192, 128, 2, 384, 384, 1),
    (8, 128, 2, 384, 384, 1),
    (8192, 128, 1, 2048, 2048, 1),
    (8192, 42, 2, 160, 160, 4),
]


@pytest.mark.parametrize("capability", _CAPABILITIES)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_forward_compiles_to_vector_loads_without_spills(capability, shape):
    import triton.language as tl

    from ultramem_megatron.kernels.lookup_prevalued import triton_kernels, triton_path

    most = triton_path.in_flight(capability)
    constants = {
        "FORMAT": "",
        "ONE_SCALE": True,
        "ACTIVATION": "gelu",
        "PRECISE": tl.float32,
        **triton_path.pool_sizes(*shape, most),
    }
    built = _compile(capability, triton_kernels.pool_kernel, "bf16", constants)
    assert built.spilled == 0
    assert built.registers <= 168
    assert "ld.global.v4.b32" in built.ptx


@pytest.mark.parametrize("capability", _CAPABILITIES)
@pytest.mark.parametrize(("coded", "one_scale"), [("int8", True), ("fp8", False)])
@pytest.mark.parametrize(
    "shape", [_SHAPES[1], *(pytest.param(shape, marks=_LONG) for shape in _SHAPES[2:4])], ids=str
)
def test_codes_are_decoded_in_registers(capability, shape, coded, one_scale):
    import triton.language as tl

    from ultramem_megatron.kernels.lookup_prevalued import triton_kernels, triton_path

    most = triton_path.in_flight(capability)
    constants = {"FORMAT": coded, "ONE_SCALE": one_scale, "ACTIVATION": "gelu"}
    constants |= {"PRECISE": tl.float32, **triton_path.pool_sizes(*shape, most)}
    built = _compile(capability, triton_kernels.pool_kernel, "bf16", constants, coded=True)
    assert built.spilled <= (12 if capability == 80 else 0)  # with 72 registers, of 255
    assert built.registers <= 168
    assert "ld.global.v4.b32" in built.ptx


@pytest.mark.parametrize("capability", _CAPABILITIES)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_backward_compiles_to_vector_loads_and_atomics_without_spills(capability, shape):
    import triton.language as tl

    from ultramem_megatron.kernels.lookup_prevalued import triton_kernels, triton_path

    _, picks, _, slice_width, pre_width, _ = shape
    most = triton_path.in_flight(capability)
    constants = {"ADD_ROWS": True, "ADD_PRE_ROWS": True, "PRECISE": tl.float32}
    constants |= triton_path.backward_sizes(picks, slice_width, pre_width, most)
    built = _compile(capability, triton_kernels.backward_kernel, "bf16", constants)
    assert built.spilled == 0
    assert built.registers <= 168
    assert "ld.global.v4.b32" in built.ptx
    if capability >= 90:  # vector atomics came with sm_90
        assert re.search(r"(red|atom).global.gpu.relaxed.add.v4.f32", built.ptx)  # Triton 3.9|3.6
