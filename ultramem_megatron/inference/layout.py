"""How the ranks that decode share a model: flags of the run that trained it, changed to theirs."""

import importlib.util
import os
from argparse import Namespace
from dataclasses import dataclass, replace

import torch

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.quantized import check_block
from ultramem_megatron.megatron.flags.layout_flags import lay_on_one_rank
from ultramem_megatron.megatron.flags.table_flags import settings_from_args
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.tables.settings import TableSettings
from ultramem_megatron.patches import registry


@dataclass(frozen=True)
class InferenceLayout:
    """How ranks share a model. None: all ranks; partition and node_size as for training.

    table_memory: where value tables are, of TABLE_MEMORIES. Those that are not on the device are
    whole on each rank, and processes of a host share what they read from disk. table_cache_rows:
    of each of those, how many rows a cache on the device holds; 0: there is none. table_format,
    table_block: what `quantized` makes of tables in host memory; None: they stay as they are.
    """

    tensor_parallel: int | None = None
    table_ranks: int | None = None
    partition: str = "auto"
    table_memory: str = "device"
    node_size: int | None = None
    table_cache_rows: int = 0
    table_format: str | None = None
    table_block: int | None = None


def describe_ranks(
    args: Namespace, ultramem: UltraMemConfig | None, layout: InferenceLayout
) -> TableSettings:
    """Replace what belongs to the training run's ranks by what these have. Raises UltraMemError."""
    if layout.table_memory != "device":
        layout = _with_whole_tables(ultramem, layout)
    ranks = int(os.environ["WORLD_SIZE"])
    tensor_parallel = layout.tensor_parallel or ranks
    _check_tensor_parallel(args, tensor_parallel, ranks)
    lay_on_one_rank(args)
    args.world_size, args.tensor_model_parallel_size = ranks, tensor_parallel
    args.recompute_granularity = args.recompute_method = None  # nothing is kept for a backward pass
    args.ultramem_overlap = layout.table_memory != "device"  # layers compute while rows come
    return _describe_experts_and_tables(args, ultramem, layout)


def _with_whole_tables(ultramem: UltraMemConfig | None, layout: InferenceLayout) -> InferenceLayout:
    if ultramem is None:
        raise UltraMemError(
            f"--table-memory {layout.table_memory}: this model has no memories. Leave it out."
        )
    if (layout.table_ranks or 1) > 1:
        raise UltraMemError(
            f"--table-memory {layout.table_memory}: tables that are not on the device are not cut "
            f"over ranks. Leave --ultramem-parallel-size {layout.table_ranks} out."
        )
    check_block("--table-block", layout.table_block, ultramem.value_dim, ultramem.pre_value_dim)
    return replace(layout, table_ranks=1)


def _check_tensor_parallel(args: Namespace, size: int, ranks: int) -> None:
    """Raise UltraMemError unless `size` ranks can share every weight matrix."""
    if size < 1 or ranks % size:
        raise UltraMemError(
            f"--tensor-model-parallel-size {size}: it must divide the {ranks} ranks of this run."
        )
    divided = {
        "--num-attention-heads": args.num_attention_heads,
        "--num-query-groups": args.num_query_groups if args.group_query_attention else size,
        "--ffn-hidden-size": args.ffn_hidden_size,
        "padded vocabulary": args.padded_vocab_size,
    }
    for name, value in divided.items():
        if value % size:
            raise UltraMemError(
                f"--tensor-model-parallel-size {size} does not divide the model's {name} ({value})."
                f" Use another size, or fewer ranks."
            )


def _describe_experts_and_tables(
    args: Namespace, ultramem: UltraMemConfig | None, layout: InferenceLayout
) -> TableSettings:
    """Experts of a plain MoE model are cut like MLPs; tables over the expert-parallel groups."""
    tensor_parallel = args.tensor_model_parallel_size
    args.expert_tensor_parallel_size = 1
    if ultramem is None:
        args.expert_tensor_parallel_size = tensor_parallel
        return TableSettings()
    if args.num_experts:  # Megatron's exchange of tokens between experts knows no lockstep
        args.expert_model_parallel_size = layout.table_ranks or tensor_parallel
        if tensor_parallel % args.expert_model_parallel_size:
            raise UltraMemError(
                f"--ultramem-parallel-size {layout.table_ranks}: with experts it must divide "
                f"--tensor-model-parallel-size {tensor_parallel}, as experts are shared likewise."
            )
    shared_by = layout.table_ranks or (None if args.num_experts else args.world_size)
    args.ultramem_parallel_size, args.ultramem_partition = shared_by, layout.partition
    args.ultramem_node_size = layout.node_size
    return settings_from_args(args, ultramem)


def describe_machine(args: Namespace, local_layers: bool) -> None:
    # The training machine may have had fused kernels that this one lacks; decoding needs none.
    for name in (
        "bias_gelu_fusion",
        "bias_swiglu_fusion",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "apply_rope_fusion",
        "gradient_accumulation_fusion",
    ):
        setattr(args, name, False)
    args.no_persist_layer_norm, args.use_cpu_initialization = True, not has_cuda()
    if not has_cuda():  # the other dispatchers need CUDA to learn how many tokens go where
        args.moe_token_dispatcher_type = "allgather"
    has_engine = importlib.util.find_spec("transformer_engine") is not None and has_cuda()
    if local_layers or not has_engine:
        args.transformer_impl, args.moe_grouped_gemm = "local", False
    # Checkpoints hold what was trained in fp8 or fp4 in half precision too.
    args.fp8 = args.fp4 = None
    args.fp8_param_gather = args.fp4_param_gather = False
    # Whatever part of training was captured, decoding is not.
    args.cuda_graph_impl, args.inference_cuda_graph_scope = "none", "none"
    args.cuda_graph_modules = []


def check_cuda_graphs(args: Namespace, tables: TableSettings) -> None:
    """Raise UltraMemError where the host takes part in a decoding step: no graph holds that."""
    reasons = (
        (
            implementation(torch.device("cuda")) == "torch",
            "PyTorch's kernels of memories ask the host about equal scores. Unset ULTRAMEM_KERNELS",
        ),
        (
            bool(args.num_experts),
            "the host tells experts how many tokens they get. Decode this model without them",
        ),
        (
            tables.size > args.tensor_model_parallel_size,
            "ranks that decode different prompts agree on each read of the tables they share. Use "
            f"--ultramem-parallel-size {args.tensor_model_parallel_size}",
        ),
        (
            tables.kind.waits_for_host,
            f"{tables.partition}-wise, the host learns how much ranks exchange. Use "
            "--ultramem-partition dimension, or --ultramem-parallel-size 1",
        ),
    )
    for given, reason in reasons:
        if given:
            raise UltraMemError(f"--cuda-graphs: {reason}.")


def has_cuda() -> bool:
    return not registry.is_applied("cpu.devices") and torch.cuda.is_available()
