"""Wrong flags end a run before training, with one message; the exit status is 2."""

import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt

_MEMORY = {"num_layers": 6, "ultramem_spans": "2:3/4:6", "ultramem_num_keys": 9,
           "ultramem_topk": 4}  # fmt: skip


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (1, {"ultramem_value_expansion": 5}, "--ultramem-value-expansion is 5"),
        (1, {"ultramem_spans": "2:4/4:6"}, "spans 2:4 and 4:6 overlap"),
        (1, {"ultramem_topk": 19}, "--ultramem-topk is 19, more than the 18 keys"),
        (1, {"ultramem_preset": "huge"}, "--ultramem-preset 'huge' is unknown"),
        (
            2,
            {
                "pipeline_model_parallel_size": 2,
                "pipeline_model_parallel_layout": "E|ttttttL",
                "ultramem_parallel_size": 2,
            },
            "must divide the 1 ranks",
        ),
        (1, {"eval_interval": None}, "--eval-interval is None; Megatron counts by it"),
        (1, {"cuda_graph_impl": "local"}, "cuda"),
        (
            1,
            {"ultramem_lazy_adam": True, "use_distributed_optimizer": True},
            "--use-distributed-optimizer cannot be combined",
        ),
        (2, {"context_parallel_size": 2, "window_size": "8,0"}, "--window-size .* needs Transform"),
    ],
)
def test_refused_before_training(world_size, changes, message):
    with pytest.raises(RanksFailed, match=message) as failed:
        run_pretrain(world_size, tiny_gpt(**{**_MEMORY, **changes}))
    assert "before the start of training step" not in str(failed.value)


def test_the_command_prints_one_message_and_no_traceback():
    command = [sys.executable, "-m", "ultramem_megatron.training.pretrain",
               *tiny_gpt(**_MEMORY, ultramem_heads=3)]  # fmt: skip
    root = ROOT
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: --ultramem-heads is 3") == 1
