"""Wrong flags end a run before training, with one message; the exit status is 2."""

import dataclasses
import os
import subprocess
import sys
from argparse import Namespace

import pytest

from tests import ROOT
from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.flags import refusals
from ultramem_megatron.megatron.flags.fsdp2_flags import refuse_torch_dcp
from ultramem_megatron.megatron.flags.refusals import (
    refuse_unsupported_flags,
    refuse_unsupported_settings,
)
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.patches import registry

_MEMORY = {"num_layers": 6, "ultramem_spans": "2:3/4:6", "ultramem_num_keys": 9, "ultramem_topk": 4}


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
        (1, {"cuda_graph_impl": "local"}, "--cuda-graph-impl local: torch sees no GPU here"),
        (1, {"optimizer": "muon", "fp16": True}, "--optimizer muon does not train in --fp16"),
        (
            1,
            {"optimizer": "soap", "save": "never", "save_interval": 1},
            "--optimizer soap: Megatron cannot save its state",
        ),
        (1, {"optimizer": "dist_muon"}, "dist_muon. trains in bf16 only"),
        (1, {"optimizer": "adaptive_muon"}, "adaptive_muon: Megatron builds it for emerging"),
        (1, {"optimizer": "muon", "ultramem_row_adam": True}, "--optimizer muon cannot be comb"),
        (1, {"ultramem_lazy_adam": True}, "--ultramem-lazy-adam is gone.* Use --ultramem-row-adam"),
        (1, {"dataloader_type": "external"}, "--dataloader-type external is for scripts"),
        (
            1,
            {"use_megatron_fsdp": True, "ckpt_format": "fsdp_dtensor", "ultramem_row_adam": True},
            "--ultramem-row-adam cannot be combined with --use-megatron-fsdp",
        ),
        (2, {"use_torch_fsdp2": True, "pipeline_model_parallel_size": 2}, "with pipeline paral"),
        (
            2,
            {"use_tp_pp_dp_mapping": True},
            "2 ranks that share a value table .the default.. Add --ultramem-parallel-size 1",
        ),
        (
            2,
            {
                "ultramem_row_adam": True,
                "use_distributed_optimizer": True,
                "ultramem_parallel_size": 1,
            },
            "here 2 ranks hold the same part of a table",
        ),
        (2, {"context_parallel_size": 2, "window_size": "8,0"}, "--window-size .* needs Transform"),
    ],
)
def test_refused_before_training(world_size, changes, message):
    with pytest.raises(RanksFailed, match=message) as failed:
        run_pretrain(world_size, tiny_gpt(**{**_MEMORY, **changes}))
    assert "before the start of training step" not in str(failed.value)


def test_the_command_prints_one_message_and_no_traceback():
    command = [
        sys.executable,
        "-m",
        "ultramem_megatron.training.pretrain",
        *tiny_gpt(**_MEMORY, ultramem_heads=3),
    ]
    root = ROOT
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: --ultramem-heads is 3") == 1


_DESIGN = UltraMemConfig(spans=(), num_keys=4, key_dim=4, value_dim=4, row_adam=True)


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("cuda_graph_impl", "transformer_engine", "--cuda-graph-impl transformer_engine"),
        ("cuda_graph_impl", "full_iteration", "--cuda-graph-impl full_iteration"),
        ("overlap_moe_expert_parallel_comm", True, "--overlap-moe-expert-parallel-comm"),
        ("freeze_all_layers", True, "--freeze-all-layers"),
        ("inprocess_restart", True, "--inprocess-restart"),
        ("non_persistent_ckpt_type", "local", "--non-persistent-ckpt-type local"),
        ("kitchen_config_file", "recipe.yaml", "--kitchen-config-file recipe.yaml"),
    ],
)
def test_a_flag_and_the_field_of_that_name_are_refused_for_one_reason(name, value, flag):
    with pytest.raises(UltraMemError) as of_flag:
        refuse_unsupported_flags(Namespace(**{name: value}), _DESIGN)
    with pytest.raises(UltraMemError) as of_field:
        refuse_unsupported_settings({name: value})
    given, reason = str(of_flag.value).split(" cannot be combined with memory layers: ")
    assert given == flag
    assert reason.endswith(". Drop the flag.")
    field, same = str(of_field.value).split(" cannot be combined with memory layers: ")
    assert field == f"{name}={value}"
    assert same.removesuffix(" Leave it out.") == reason.removesuffix(" Drop the flag.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline_model_parallel_size": 4}, "to the first and last of two pipeline stages only"),
        ({"create_attention_mask_in_dataloader": False}, "in-dataloader to none"),
        ({"sft": True, "context_parallel_size": 2}, "--sft with --context-parallel-size 2 cannot"),
    ],
)
def test_the_convolution_is_refused_where_it_cannot_know_of_documents(changes, message):
    design = dataclasses.replace(_DESIGN, query_conv_kernel=3, row_adam=False)
    given = {**_OTHERS, "reset_attention_mask": "sft" not in changes}
    with pytest.raises(UltraMemError, match=message):
        refuse_unsupported_flags(Namespace(**{**given, **changes}), design)
    refuse_unsupported_flags(Namespace(**given), design)


_OTHERS = {
    "cuda_graph_impl": "none",
    "ultramem_overlap": False,
    "hybrid_layer_pattern": None,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": None,
    "create_attention_mask_in_dataloader": True,
    "context_parallel_size": 1,
    "dataloader_inter_document_masking": False,
    "sft": False,
    "reset_attention_mask": False,
    "optimizer": "adam",
    "use_distributed_optimizer": False,
    "use_torch_fsdp2": False,
    "use_megatron_fsdp": False,
    "ckpt_format": "torch_dist",
    "ckpt_convert_format": None,
}


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("ultramem_overlap", True, "--ultramem-overlap: a graph would hold the parts of a memory"),
        ("hybrid_layer_pattern", "*-*-", "memories in a HybridModel (*-*-)"),
    ],
)
def test_graphs_of_layers_are_refused_where_memories_would_get_into_them(name, value, flag):
    given = {**_OTHERS, "cuda_graph_impl": "local"}
    refuse_unsupported_flags(Namespace(**given), _DESIGN)
    with pytest.raises(UltraMemError) as refused:
        refuse_unsupported_flags(Namespace(**{**given, name: value}), _DESIGN)
    assert str(refused.value).startswith(f"--cuda-graph-impl local cannot be combined with {flag}")


def test_a_config_with_graphs_and_overlap_is_refused():
    refuse_unsupported_settings({"cuda_graph_impl": "local", "memory_overlap": False})
    with pytest.raises(UltraMemError, match=r"=local cannot .* memory_overlap"):
        refuse_unsupported_settings({"cuda_graph_impl": "local", "memory_overlap": True})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_layer_pattern": "M-*-"}, "with Mamba layers"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl cannot be combined with --use-torch"),
        ({"ultramem_train_rows": 8}, "--ultramem-train-rows cannot be combined with --use-torch"),
    ],
)
def test_what_needs_other_weights_than_shards_is_refused(changes, message):
    design = dataclasses.replace(_DESIGN, row_adam=False)
    with pytest.raises(UltraMemError, match=message):
        refuse_unsupported_flags(
            Namespace(**{**_OTHERS, "use_torch_fsdp2": True, **changes}), design
        )


_NO_ROW_ADAM = dataclasses.replace(_DESIGN, row_adam=False)
_MEGATRON_FSDP = {
    **_OTHERS,
    "use_megatron_fsdp": True,
    "ckpt_format": "fsdp_dtensor",
    "data_parallel_sharding_strategy": "no_shard",
    "pipeline_model_parallel_size": 1,
    "num_distributed_optimizer_instances": 1,
    **dict.fromkeys(("bf16", "fp16", "finetune", "no_load_optim"), False),
    **dict.fromkeys(("load", "pretrained_checkpoint")),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ckpt_format": "torch_dist"}, "Use --ckpt-format fsdp_dtensor"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl cannot .* --use-megatron-fsdp"),
        ({"ddp_average_in_collective": True}, "the mean would be over the ranks that have"),
        ({"pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size 2 cannot"),
        ({"num_distributed_optimizer_instances": 2}, "--num-distributed-optimizer-instances 2"),
        (
            {"bf16": True, "pretrained_checkpoint": "there"},
            "cannot take weights without the optimizer's state",
        ),
        ({"verify_integrity": True}, "nothing sums up its checkpoints"),
    ],
)
def test_what_megatron_fsdp_cannot_do_with_tables_is_refused(changes, message):
    refuse_unsupported_flags(Namespace(**_MEGATRON_FSDP), _NO_ROW_ADAM)
    with pytest.raises(UltraMemError, match=message):
        refuse_unsupported_flags(Namespace(**{**_MEGATRON_FSDP, **changes}), _NO_ROW_ADAM)


def test_megatron_fsdp_that_the_door_is_not_written_for_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "installed_version", lambda name: "0.20.0")
    with pytest.raises(UltraMemError, match="would cut value tables over all ranks"):
        refuse_unsupported_flags(Namespace(**_MEGATRON_FSDP), _NO_ROW_ADAM)


def test_a_field_for_megatron_fsdp_is_refused():
    with pytest.raises(UltraMemError, match=r"use_megatron_fsdp=True cannot .* Leave it out"):
        refuse_unsupported_settings({"use_megatron_fsdp": True})


@pytest.mark.parametrize("flag", ["save", "load", "pretrained_checkpoint"])
def test_a_format_that_megatron_cannot_load_is_refused_for_every_model(flag):
    folders = dict.fromkeys(("save", "load", "pretrained_checkpoint"))
    refuse_torch_dcp(Namespace(ckpt_format="torch_dcp", **folders))
    refuse_torch_dcp(Namespace(ckpt_format="torch_dist", **{**folders, flag: "there"}))
    with pytest.raises(UltraMemError, match=r"torch_dcp: .* Use --ckpt-format torch_dist"):
        refuse_torch_dcp(Namespace(ckpt_format="torch_dcp", **{**folders, flag: "there"}))


@pytest.mark.parametrize("name", ["ckpt_format", "ckpt_convert_format"])
def test_other_formats_of_checkpoints_are_refused(name):
    with pytest.raises(UltraMemError, match="the format torch cannot hold memory layers"):
        refuse_unsupported_flags(Namespace(**{**_OTHERS, name: "torch"}), _DESIGN)


def test_nothing_is_refused_that_is_off_or_without_memories():
    off = {"cuda_graph_impl": "none", "use_megatron_fsdp": False, "fp8": None}
    refuse_unsupported_settings(off)
    refuse_unsupported_flags(Namespace(**{**_OTHERS, **off}), _DESIGN)
    refuse_unsupported_flags(Namespace(cuda_graph_impl="local"), None)


def test_weights_made_on_the_cpu_are_refused_beside_a_gpu(monkeypatch):
    """Seen on one: the first step ends with tensors on two devices."""
    names = (*refusals._TRAIN_REFUSES, "dataloader_type", "rampup_batch_size")
    given = Namespace(**dict.fromkeys(names), use_cpu_initialization=True)
    refusals.refuse_other_tasks(given)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UltraMemError, match=r"--use-cpu-initialization: .* Drop the flag"):
        refusals.refuse_other_tasks(given)


def test_batches_that_would_not_grow_are_refused():
    names = (*refusals._TRAIN_REFUSES, "dataloader_type", "use_cpu_initialization")
    given = Namespace(**dict.fromkeys(names), rampup_batch_size=[2, 2, 8])
    refusals.refuse_other_tasks(given)  # a Megatron that has no other flag for it
    given.step_batch_size_schedule = None
    with pytest.raises(UltraMemError, match="--rampup-batch-size 2 2 8: Megatron reads it nowhere"):
        refusals.refuse_other_tasks(given)
