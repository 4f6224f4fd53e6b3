"""What memory layers refuse beside --use-megatron-fsdp; the rest is refused by Megatron itself."""

from argparse import Namespace

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.patches import registry
from ultramem_megatron.patches.doors import megatron_fsdp_parts
from ultramem_megatron.patches.patch import SUPPORTED_MEGATRON

_REASONS = {
    "ultramem_train_rows": "rows are chosen by gradients in the buffers of Megatron's DDP",
    "ultramem_row_adam": "it counts the steps of rows in parameters that are not cut",
    "ultramem_log_tables_interval": "steps of tables are measured in parameters that are not cut",
    "cuda_graph_impl": "graphs hold the addresses of weights, which come and go with each layer",
    "ddp_average_in_collective": "the mean would be over the ranks that have the same part of a "
    "table, not over all that have brought gradients",
    "fsdp_double_buffer": "its buffers are for layers of one size, and memories make them differ",
    "nccl_ub": "it asks for --fsdp-double-buffer, whose buffers are for layers of one size",
    "megatron_fsdp_enable_fine_grained_param_gather": "a memory reads weights of modules that it "
    "does not call",
    "verify_integrity": "nothing sums up its checkpoints",
    "async_save": "nothing of it has been tried",
    "init_model_with_meta_device": "its modules are not drawn anew where they are cut",
    "hybrid_layer_pattern": "nothing of it has been tried",
}


def refuse_beside_megatron_fsdp(args: Namespace) -> None:
    """Raise UltraMemError for flags that Megatron-FSDP's shards of a memory do not go with."""
    if not args.use_megatron_fsdp:
        return
    if not registry.fits(megatron_fsdp_parts.PATCH):
        raise UltraMemError(
            f"--use-megatron-fsdp cannot be combined with memory layers: this megatron-core would "
            f"cut value tables over all ranks. Use one of {SUPPORTED_MEGATRON}, or Megatron's DDP."
        )
    for name, reason in _REASONS.items():
        if getattr(args, name, None) not in (None, False, "none"):
            raise UltraMemError(
                f"--{name.replace('_', '-')} cannot be combined with --use-megatron-fsdp and "
                f"memory layers: {reason}. Drop one of the two."
            )
    for name in ("pipeline_model_parallel_size", "num_distributed_optimizer_instances"):
        if getattr(args, name) > 1:
            raise UltraMemError(
                f"--{name.replace('_', '-')} {getattr(args, name)} cannot be combined with "
                f"--use-megatron-fsdp and memory layers: its meshes of ranks have no place for "
                f"them. Use 1, or Megatron's DDP."
            )
    weights_alone = args.load and (args.finetune or args.no_load_optim)
    if (args.bf16 or args.fp16) and (weights_alone or args.pretrained_checkpoint):
        raise UltraMemError(
            "--use-megatron-fsdp with --bf16 or --fp16 and --finetune, --no-load-optim or "
            "--pretrained-checkpoint: Megatron cannot take weights without the optimizer's state "
            "into it. Load them in float32, or with Megatron's DDP."
        )
