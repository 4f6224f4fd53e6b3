"""Every setting of Megatron's that is refused before anything is built, and why."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.flags.fsdp2_flags import refuse_beside_fsdp2
from ultramem_megatron.megatron.flags.megatron_fsdp_flags import refuse_beside_megatron_fsdp
from ultramem_megatron.megatron.flags.missing_packages import refuse_low_precision
from ultramem_megatron.megatron.flags.row_adam_flags import refuse_row_adam
from ultramem_megatron.megatron.flags.table_memory_flags import refuse_table_memory
from ultramem_megatron.megatron.flags.train_rows_flags import refuse_train_rows
from ultramem_megatron.memory.config import UltraMemConfig, flag
from ultramem_megatron.memory.placement import placements

_MEMORIES_REFUSE = {
    "overlap_moe_expert_parallel_comm": "its schedule does not call the layer's forward",
    "kitchen_config_file": "memory layers compute in fp32, fp16 or bf16",
    "freeze_all_layers": "Megatron's model builders freeze nothing, and all weights would be "
    "trained (--ultramem-train-only memory freezes all but the memories)",
    "inprocess_restart": "a restart would leave the tables' process groups behind; let torchrun "
    "restart (--max-restarts), from the last checkpoint",
    "non_persistent_ckpt_type": "design, table cut and sums of such a checkpoint are not checked",
    "moe_use_upcycling": "it builds a second model, for which memories have no weights",
    "perform_rl_step": "memory layers are trained on text alone",
    "apply_residual_connection_post_layernorm": "nothing in Megatron reads it any more",
}
"""By the name that it has in Megatron's parsed flags and in its configs."""
_GRAPHS_REFUSED = {
    "transformer_engine": "its graphs hold a layer without its memory branch (local leaves it "
    "beside them)",
    "full_iteration": "a graph of a whole step would hold exchanges of tables that the host takes "
    "part in (local leaves them beside its graphs)",
}
_TRAIN_REFUSES = (
    "apply_residual_connection_post_layernorm",
    "freeze_all_layers",
    "inprocess_restart",
    "perform_rl_step",
    "sft",
    "fim_data",
    "hybrid_context_parallel",
    "logits_load_dir",
)
_PACKED = ("dataloader_inter_document_masking", "sft")
"""Flags whose sequences hold several documents side by side."""
_OFF = (None, False, "none")


def refuse_unsupported_flags(args: Namespace, ultramem: UltraMemConfig | None) -> None:
    """Raise UltraMemError for Megatron flags that memory layers cannot honour."""
    if ultramem is None:
        return
    for name, value, reason in _refused(vars(args)):
        given = _flag(name) if value is True else f"{_flag(name)} {value}"
        raise UltraMemError(
            f"{given} cannot be combined with memory layers: {reason}. Drop the flag."
        )
    _check_graphs(args)
    other = args.ckpt_convert_format or args.ckpt_format
    wanted = "fsdp_dtensor" if args.use_megatron_fsdp else "torch_dist"
    if other != wanted:
        raise UltraMemError(
            f"checkpoints in the format {other} cannot hold memory layers: with it an optimizer's "
            f"state may be of another iteration than its weights, and damage, other designs and "
            f"other layouts go unnoticed. Use --ckpt-format {wanted}, without conversion."
        )
    _check_log_tables_interval(args)
    if _share(ultramem) and args.overlap_grad_reduce and args.recompute_granularity == "full":
        raise UltraMemError(
            f"--overlap-grad-reduce with --recompute-granularity full cannot be combined with "
            f"{flag('share_values')} {ultramem.share_values:g}: recomputed layers give their parts "
            f"of a shared table's gradient one by one, and the first would be reduced alone. Drop "
            f"one of the two."
        )
    _check_sgd(args)
    refuse_beside_fsdp2(args)
    refuse_beside_megatron_fsdp(args)
    refuse_train_rows(args, ultramem)
    refuse_row_adam(args, ultramem)
    refuse_table_memory(args, ultramem)
    if ultramem.query_conv_kernel > 1:
        _check_documents(args, f"{flag('query_conv_kernel')} {ultramem.query_conv_kernel}")


def _refused(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Name, value and reason of what no memory can be combined with."""
    for name, reason in _MEMORIES_REFUSE.items():
        if settings.get(name) not in _OFF:
            yield name, settings[name], reason
    graphs = settings.get("cuda_graph_impl")
    if graphs in _GRAPHS_REFUSED:
        yield "cuda_graph_impl", graphs, _GRAPHS_REFUSED[graphs]


def _check_graphs(args: Namespace) -> None:
    """Graphs hold layers; what memories compute may not get into them."""
    if args.cuda_graph_impl != "local":
        return
    if args.ultramem_overlap:
        raise UltraMemError(
            "--cuda-graph-impl local cannot be combined with --ultramem-overlap: a graph would "
            "hold the parts of a memory that run beside its layer. Drop one of the two."
        )
    if args.hybrid_layer_pattern is not None:
        raise UltraMemError(
            f"--cuda-graph-impl local cannot be combined with memories in a HybridModel "
            f"({args.hybrid_layer_pattern}): nothing of it has been tried. Drop the flag."
        )


def _check_sgd(args: Namespace) -> None:
    """Megatron's plain SGD has no state of the form that its checkpoints ask for."""
    if args.optimizer != "sgd":
        return
    if args.save and not args.no_save_optim:
        raise UltraMemError(
            "--optimizer sgd: Megatron cannot load its state from a checkpoint again. Use adam, or "
            "add --no-save-optim, and --no-load-optim to go on."
        )
    if args.load and not (args.no_load_optim or args.finetune):
        raise UltraMemError(
            "--optimizer sgd: Megatron cannot load an optimizer's state into it. Use adam, or add "
            "--no-load-optim: weights alone."
        )


def _check_documents(args: Namespace, convolution: str) -> None:
    """Every stage with a memory must be told where documents end."""
    stages = args.pipeline_model_parallel_size > 2 or args.virtual_pipeline_model_parallel_size
    if args.reset_attention_mask and (stages or not args.create_attention_mask_in_dataloader):
        raise UltraMemError(
            f"--reset-attention-mask cannot be combined with {convolution} here: Megatron gives "
            f"attention masks to the first and last of two pipeline stages only, and with "
            f"--no-create-attention-mask-in-dataloader to none, so the convolution would look over "
            f"the ends of documents. Drop one of them."
        )
    packed = [name for name in _PACKED if getattr(args, name)]
    if packed and args.context_parallel_size > 1:
        raise UltraMemError(
            f"{_flag(packed[0])} with --context-parallel-size {args.context_parallel_size} cannot "
            f"be combined with {convolution}: each document is cut. Drop one of the three."
        )


def _share(ultramem: UltraMemConfig) -> bool:
    places = placements(ultramem)
    return len({place.table for place in places}) < len(places)


def _check_log_tables_interval(args: Namespace) -> None:
    interval = getattr(args, "ultramem_log_tables_interval", None)
    if interval is None:
        return
    given = f"--ultramem-log-tables-interval {interval}"
    if interval < 1 or interval % args.log_interval:
        raise UltraMemError(
            f"{given}: it must be a multiple of --log-interval {args.log_interval}. Use for "
            f"example {10 * args.log_interval}."
        )
    if not (args.tensorboard_dir or args.wandb_project):
        raise UltraMemError(
            f"{given}: there is nowhere to log to. Give --tensorboard-dir DIR or --wandb-project."
        )
    if args.use_precision_aware_optimizer:
        raise UltraMemError(
            f"{given} cannot be combined with --use-precision-aware-optimizer: it keeps no float32 "
            f"weights to measure a step by. Drop one of the two."
        )


def refuse_unsupported_settings(settings: Mapping[str, Any]) -> None:
    """As `refuse_unsupported_flags`, of settings by name where they are fields and not flags."""
    for name, value, reason in _refused(settings):
        raise UltraMemError(
            f"{name}={value} cannot be combined with memory layers: {reason}. Leave it out."
        )
    if settings.get("use_megatron_fsdp"):
        raise UltraMemError(
            "use_megatron_fsdp=True cannot be combined with memory layers here: only ultramem "
            "train and run save parts of tables in its format. Leave it out."
        )
    if settings.get("cuda_graph_impl") == "local" and settings.get("memory_overlap"):
        raise UltraMemError(
            "cuda_graph_impl=local cannot be combined with memory_overlap: a graph would hold the "
            "parts of a memory that run beside its layer. Leave out one of the two."
        )
    refuse_low_precision(settings)


def refuse_other_tasks(args: Namespace) -> None:
    """Raise for flags that ask for another task than pre-training, or for it in another place.

    Raises:
        UltraMemError: names the flag and what to do.
    """
    for name in _TRAIN_REFUSES:
        if getattr(args, name) not in _OFF:
            raise UltraMemError(
                f"{_flag(name)} is not supported by ultramem train (plain GPT pre-training); "
                f"remove the flag."
            )
    if args.rampup_batch_size and hasattr(args, "step_batch_size_schedule"):
        given = " ".join(map(str, args.rampup_batch_size))
        raise UltraMemError(
            f"--rampup-batch-size {given}: Megatron reads it nowhere, and batches would be "
            "whole from the start. Use --step-batch-size-schedule '0:16 10B:32' (tokens: "
            "batch size) in place of --global-batch-size."
        )
    if args.use_cpu_initialization and torch.cuda.is_available():
        raise UltraMemError(
            "--use-cpu-initialization: beside a GPU Megatron's builders leave the weights on the "
            "CPU, and the first step fails. Drop the flag."
        )
    if args.dataloader_type == "external":
        raise UltraMemError(
            "--dataloader-type external is for scripts that bring their own loader (energon); "
            "ultramem train reads Megatron's data sets. Drop the flag, or use ultramem run."
        )


def require_eval_interval(args: Namespace) -> None:
    """Raise UltraMemError without --eval-interval: Megatron 0.19 divides by it, whatever it is."""
    if not (args.eval_interval or args.full_validation or args.skip_train):
        raise UltraMemError(
            f"--eval-interval is {args.eval_interval}; Megatron counts by it how many samples to "
            f"validate with. Give a number of steps, and --eval-iters 0 for no validation."
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
