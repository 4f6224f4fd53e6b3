"""The settings in force: once in the log, in TensorBoard and in the checkpoint, as they came to."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.megatron.upstream_noise import SHOW


def _stored(folder):
    from ultramem_megatron.megatron.checkpoint.folder import checkpoint_folder, stored_args
    from ultramem_megatron.patches import registry

    registry.apply_all()
    return stored_args(checkpoint_folder(folder)).ultramem_in_force


def test_they_stand_in_tensorboard_and_checkpoint_as_they_came_to(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = tiny_gpt(
        num_layers=5,
        ultramem_preset="ultramem-151m-x12",
        ultramem_spans="1:2/3:5",
        ultramem_num_keys=12,
        ultramem_key_dim=8,
        ultramem_value_dim=16,
        ultramem_topk=6,
        train_iters=1,
        tensorboard_dir=tmp_path / "tb",
        save=tmp_path / "save",
        save_interval=1,
        ckpt_format="torch_dist",
    )
    run_pretrain(2, argv)
    (found,) = run_on_ranks(1, _stored, str(tmp_path / "save"))
    assert found["preset"] == "ultramem-151m-x12"
    assert (found["spans"], found["topk"]) == ("1:2/3:5", "6")
    assert (found["heads"], found["query_conv_kernel"]) == ("2", "5")  # the preset's
    assert found["tables"].startswith("over 2 ranks, ")
    assert f"torch {torch.__version__}" in found["versions"]
    assert found["patches"].startswith("cpu: devices, ")
    assert found["commit"]
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    text = events.Tensors("ultramem_in_force/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "'query_conv_kernel': '5'" in text


@pytest.mark.parametrize("shown", [False, True])
def test_the_log_has_them_once_and_upstreams_noise_on_demand(shown):
    environment = {**os.environ, SHOW: "1" if shown else "0", "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ultramem_megatron",
            "train",
            *tiny_gpt(train_iters=1, ultramem_spans="1:2", ultramem_num_keys=12, ultramem_topk=6),
        ],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    said = done.stdout + done.stderr
    for words in ("Apex is not installed", "GPTModel IS DEPRECATED", "No CUDA runtime is found"):
        assert (words in said) == shown, words
    _, block = said.split(" UltraMem, settings in force ")  # once
    block = block.split("-" * 100)[0]
    assert re.search(r"  topk +6\b", block)
    assert re.search(r"  heads +2\b", block)  # a default
    assert len(block.splitlines()) < 45  # a screen, with what is upstream's around it
