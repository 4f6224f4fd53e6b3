"""Every op and a whole layer on a GPU, in float32 and bfloat16, against the reference there."""

import os

import pytest
import torch

from launch.gpu_report.parts import parity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "ULTRAMEM_TEST_GPU" not in os.environ,
        reason="tests see a GPU only when asked to: bash tests/run.sh --gpu",
    ),
]

_MOST = {"float32": 1e-5, "bfloat16": 1e-2}
_NEAR_TIES = 3e-2
"""Of two keys that score alike one implementation takes the one, one the other."""


def test_every_op_equals_its_reference():
    assert torch.cuda.is_available(), "--gpu was given, but PyTorch sees no GPU here"
    rows = list(parity.rows(large=True))
    assert not [row for row in rows if row.error]
    errors = {row.what: row.value for row in rows if row.unit.startswith("relative")}
    assert errors
    for what, error in errors.items():
        exact = what.startswith(("lookup", "query convolution"))
        most = _MOST["bfloat16" if "bfloat16" in what else "float32"] if exact else _NEAR_TIES
        assert error <= most, what
