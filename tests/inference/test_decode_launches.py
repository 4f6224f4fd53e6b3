"""How many kernels a memory launches in a decode step, on its way through Megatron's layer."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests import ROOT

_PRESET = {  # as presets of the paper, small
    "num_layers": 4,
    "bf16": True,
    "ultramem_spans": "1:2/3:4",
    "ultramem_num_keys": 12,
    "ultramem_key_dim": 16,
    "ultramem_value_dim": 16,
    "ultramem_topk": 6,
    "ultramem_qk_norm": "layernorm",
    "ultramem_query_conv_kernel": 5,
    "ultramem_init": "official",
}
PRODUCTS = {"aten::mm": 2, "aten::bmm": 1}  # query, values; scores of all heads, ranks, sides
BETWEEN = {
    "triton::step_kernel": 1,
    "triton::norm_kernel": 1,
    "triton::select_kernel": 1,
    "triton::grid_kernel": 1,
    "triton::pool_kernel": 1,
}


def _print_launches():
    """A line for each memory of a tiny model, in a process whose Triton interprets."""
    import torch

    from launch.benchmarks.decode_step import DecodeStep
    from tests.inference.launches import count_launches
    from tests.training_runs import tiny_gpt
    from ultramem_megatron.inference.loading import prepare_for_inference
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.memory.layer import memory_layers

    model, _ = untrained_model(tiny_gpt(**_PRESET))
    prepare_for_inference(model)
    step = DecodeStep(model, [3, 3], 500)

    def counted(forward):
        def call(*args, **kwargs):
            with count_launches() as launched:
                out = forward(*args, **kwargs)
            print("launched:", *launched)
            return out

        return call

    with torch.no_grad():
        step()  # the first makes the convolution's history
        for memory in memory_layers(model):
            memory.forward = counted(memory.forward)
        step()


def _print_errors():
    """How far three steps of a layer are from the reference's, in float32."""
    import torch

    from launch.benchmarks.kernels.shapes import Shape
    from launch.gpu_report.parts.decoding_parity import outputs
    from tests.closeness import relative_error

    os.environ["ULTRAMEM_KERNELS"] = "reference"  # calibrating takes a minute in the interpreter
    shape = Shape(tokens=2, hidden=16, num_keys=12, topk=4, value_dim=8)
    expected, found = outputs(shape, torch.device("cpu"), ["reference", "triton"])
    print("errors:", *(float(relative_error(found[name], expected[name])) for name in expected))


def test_a_memory_launches_eight_kernels_in_a_decode_step():
    """Three products and what lies between, nothing of which reads on the host.

    The layer adds the result to its own: nine.
    """
    pytest.importorskip("triton", reason="Triton is for Linux")
    program = (
        "from tests.inference import test_decode_launches as t; "
        "t._print_launches(); t._print_errors()"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ULTRAMEM_KERNELS": "triton", "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.split()[1:] for line in run.stdout.splitlines() if line.startswith("launched:")]
    assert len(lines) == 2, run.stderr[-3000:]
    errors = run.stdout.partition("errors:")[2].split()[:2]
    assert len(errors) == 2, run.stderr[-3000:]
    assert all(float(error) < 1e-6 for error in errors)
    for launched in lines:
        assert Counter(launched) == Counter(PRODUCTS) + Counter(BETWEEN)
