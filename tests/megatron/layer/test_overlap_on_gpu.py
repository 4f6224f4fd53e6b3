"""On GPUs: overlap changes no bit there either, with one connection or several, on one or two."""

import os

import pytest

from tests.megatron.layer.test_overlap import assert_no_bit_changes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "ULTRAMEM_TEST_GPU" not in os.environ,
        reason="tests see a GPU only when asked to: bash tests/run.sh --gpu",
    ),
]

_EXACT = {"deterministic_mode": True, "micro_batch_size": 2, "train_iters": 50}
_OVERLAPS = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "ddp_bucket_size": 20_000,
}


@pytest.mark.parametrize("connections", ["1", "8"])
@pytest.mark.parametrize(
    "layout", [{}, {"bf16": True}, _OVERLAPS], ids=["plain", "bf16", "buckets"]
)
@pytest.mark.parametrize(
    ("ranks", "partition"), [(1, "dimension"), (2, "dimension"), (2, "number")]
)
def test_overlap_changes_no_bit(ranks, partition, layout, connections):
    import torch

    if torch.cuda.device_count() < ranks:
        pytest.skip(f"this machine has fewer than {ranks} GPUs")
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": connections, "NCCL_ALGO": "Ring"}
    flags = {**_EXACT, **layout, "ultramem_partition": partition}
    assert_no_bit_changes(ranks, flags, environment)
