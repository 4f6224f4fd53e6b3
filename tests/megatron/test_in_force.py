"""The settings in force: once in the log, in TensorBoard and in the checkpoint, as they came to."""

import os
import subprocess
import sys

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.megatron.upstream_noise import SHOW


def _stored(folder):
    from ultramem_megatron.megatron.checkpoint.design import checkpoint_folder, stored_args
    from ultramem_megatron.patches import registry

    registry.apply_all()
    return stored_args(checkpoint_folder(folder)).ultramem_in_force


def test_they_stand_in_the_log_tensorboard_and_checkpoint(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = tiny_gpt(
        num_layers=5, ultramem_preset="ultramem-151m-x12", ultramem_spans="1:2/3:5",
        ultramem_num_keys=12, ultramem_key_dim=8, ultramem_value_dim=None, ultramem_topk=6,
        train_iters=1, tensorboard_dir=tmp_path / "tb", save=tmp_path / "save", save_interval=1,
        ckpt_format="torch_dist",
    )  # fmt: skip
    run_pretrain(2, [*argv, "--ultramem-value-dim", "16"], print_output=True)
    printed = capsys.readouterr().out
    assert printed.count("UltraMem, settings in force") == 1
    block = printed.split("settings in force ")[1].split("-" * 100)[0]
    found = dict(line.split(None, 1) for line in block.splitlines()[1:] if line.startswith("  "))
    assert found["preset"] == "ultramem-151m-x12"
    assert (found["spans"], found["topk"]) == ("1:2/3:5", "6")
    assert (found["heads"], found["query_conv_kernel"]) == ("2", "5")  # the preset's
    assert found["tables"].startswith("over 2 ranks, ")
    assert f"torch {torch.__version__}" in found["versions"]
    assert found["patches"].startswith("cpu.devices, ")
    assert "commit" in found

    (stored,) = run_on_ranks(1, _stored, str(tmp_path / "save"))
    assert stored["query_conv_kernel"] == "5"
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    text = events.Tensors("ultramem_in_force/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "'query_conv_kernel': '5'" in text


def test_a_plain_gpt_says_so(capsys):
    run_pretrain(1, tiny_gpt(train_iters=1), print_output=True)
    assert "  memory layers       none: a plain GPT" in capsys.readouterr().out


@pytest.mark.parametrize("shown", [False, True])
def test_what_upstream_says_at_every_start_is_shown_on_demand_only(shown):
    environment = {**os.environ, SHOW: "1" if shown else "0", "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, "-m", "ultramem_megatron", "train",
         *tiny_gpt(train_iters=1, ultramem_spans="1:2", ultramem_num_keys=12, ultramem_topk=6)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    said = done.stdout + done.stderr
    for words in ("Apex is not installed", "GPTModel IS DEPRECATED", "No CUDA runtime is found"):
        assert (words in said) == shown, words
    ours = [line for line in said.splitlines() if "ultramem" in line.lower() or "memory" in line]
    assert len(ours) < 50
