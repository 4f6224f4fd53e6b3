"""Load a checkpoint written by training onto this process, or the ranks of a torchrun, to decode.

The checkpoint may have been written in any parallel layout. Ranks first form tensor-parallel
groups, each of which decodes a batch of its own; value tables are cut over the ranks of one or
several of them. Megatron's process groups are made anew, so a process that trains must not load.
"""

import importlib.util
import math
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.integrity import check_before_reading
from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.tables.settings import TableSettings
from ultramem_megatron.patches import registry

_STEP_TOKENS = 4096
"""Of prompts, in one step of dynamic batching; further requests wait."""


@dataclass(frozen=True)
class InferenceLayout:
    """How ranks share a model. None: all ranks; partition as for training."""

    tensor_parallel: int | None = None
    table_ranks: int | None = None
    partition: str = "auto"


class LoadedModel(NamedTuple):
    """A GPT in evaluation mode, its tokenizer, and the flags it was trained with."""

    model: Any
    tokenizer: Any
    args: Namespace


def load_for_inference(
    load: str,
    *,
    ckpt_step: int | None = None,
    tokenizer_model: str | None = None,
    layout: InferenceLayout | None = None,
    cuda_graphs: bool = False,
    premultiply_values: bool = False,
) -> LoadedModel:
    """Load the latest (or the given) iteration of a `torch_dist` checkpoint; all ranks call it.

    Model and tokenizer are described by the flags stored in it.

    load: the folder given to --save. tokenizer_model: where the tokenizer is now, if it moved.
    cuda_graphs: see `build_model`. premultiply_values: see `prepare_for_inference`.
    Raises UltraMemError if there is no such checkpoint or tokenizer, or if the model cannot be laid
    out so.
    """
    model, args = load_model(
        load, ckpt_step=ckpt_step, layout=layout, cuda_graphs=cuda_graphs,
        premultiply_values=premultiply_values,
    )  # fmt: skip
    if tokenizer_model is not None:
        args.tokenizer_model = tokenizer_model
    return LoadedModel(model, _tokenizer(args), args)


def load_model(
    load: str,
    *,
    ckpt_step: int | None = None,
    layout: InferenceLayout | None = None,
    local_layers: bool = False,
    cuda_graphs: bool = False,
    premultiply_values: bool = False,
) -> tuple[Any, Namespace]:
    """As `load_for_inference`, without the tokenizer: the model and its flags.

    local_layers: build Megatron's own layers even where Transformer Engine is installed.
    """
    from ultramem_megatron.megatron.checkpoint.design import checkpoint_folder, stored_args
    from ultramem_megatron.training.pretrain import set_single_process_environment

    set_single_process_environment()
    registry.apply_all()
    if cuda_graphs and not _has_cuda():
        raise UltraMemError("--cuda-graphs: there is no NVIDIA GPU here. Decode without them.")
    folder = checkpoint_folder(load, ckpt_step)
    check_before_reading(Path(folder))
    args = stored_args(folder)
    model = build_model(
        args, layout or InferenceLayout(), local_layers=local_layers, cuda_graphs=cuda_graphs
    )
    _load_weights(model, folder)
    prepare_for_inference(model, premultiply_values)
    return model, args


def prepare_for_inference(model: Any, premultiply_values: bool = False) -> None:
    """Evaluation mode, and what memory layers need not repeat; weights must stay as they are.

    premultiply_values: see UltraMemLayer.prepare_for_inference.
    """
    from ultramem_megatron.megatron.optimizer.auxiliary_loss import memory_layers

    model.eval()
    for layer in memory_layers(model):
        layer.prepare_for_inference(premultiply_values)


def build_model(
    args: Namespace,
    layout: InferenceLayout,
    *,
    local_layers: bool = False,
    cuda_graphs: bool = False,
) -> Any:
    """The GPT that Megatron's flags `args` describe, on the ranks of this run, newly initialised.

    `args` is changed to describe these ranks instead of those of the training run. cuda_graphs: let
    Megatron capture its transformer block, memories included, as one CUDA graph for each number of
    requests that decode together; for dynamic batching. Raises UltraMemError.
    """
    from ultramem_megatron.megatron.flags.arguments import config_from_args

    ultramem = config_from_args(args)
    tables = _describe_ranks(args, ultramem, layout)
    _describe_machine(args, local_layers)
    if cuda_graphs:
        _check_cuda_graphs(args, tables)
        args.cuda_graph_impl, args.inference_cuda_graph_scope = "local", "block"
        args.cuda_graph_warmup_steps = 3  # the first makes caches, which a capture must not
    _initialize(args, tables)
    model = _build(args, ultramem, tables)
    if tables.size > args.tensor_model_parallel_size:
        from ultramem_megatron.megatron.optimizer.auxiliary_loss import memory_layers

        for layer in memory_layers(model):
            layer.values.read_in_lockstep()
    return model


def dynamic_context(model: Any, requests: int, length: int, block_tokens: int = 256) -> Any:
    """Megatron's DynamicInferenceContext with room for so many requests of `length` tokens.

    Unlike one made from the model's config alone it knows that an expert-parallel group without
    experts only shares tables. block_tokens: of a block of the cache; FlashAttention asks for 256.

    Raises UltraMemError for experts over several ranks, whose exchange under dynamic batching needs
    kernels of a GPU that have not been tried.
    """
    from megatron.core import parallel_state
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_model_config

    config = get_model_config(model)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if groups.ep.size() > 1:
        if config.num_moe_experts:
            raise UltraMemError(
                f"Dynamic batching of a model whose experts are shared by {groups.ep.size()} ranks "
                f"is not supported. Use static batching, or --ultramem-parallel-size 1."
            )
        groups.ep = parallel_state.get_context_parallel_group()  # of one rank, in decoding
    ranks = groups.tp.size()
    slots = math.ceil(requests / math.lcm(4, ranks)) * math.lcm(4, ranks)
    heads = math.ceil((config.num_query_groups or config.num_attention_heads) / ranks)
    token_bytes = 2 * config.num_layers * heads * config.kv_channels * config.params_dtype.itemsize
    blocks = slots * math.ceil(length / block_tokens) + 2  # one is a dummy, one rounds up
    return DynamicInferenceContext(
        config,
        InferenceConfig(
            max_sequence_length=length,
            max_requests=slots,
            max_tokens=max(slots, length, _STEP_TOKENS),
            block_size_tokens=block_tokens,
            buffer_size_gb=blocks * block_tokens * token_bytes / 2**30,
            pg_collection=groups,
            # None: no graphs. A graph is captured for each power of two.
            num_cuda_graphs=slots.bit_length() if config.cuda_graph_impl == "local" else None,
            use_cuda_graphs_for_non_decode_steps=False,
        ),
    )


def serve_until_all_finish(model: Any) -> None:
    """After the last forward pass of this rank: take part in the table reads of the others.

    Needed where ranks that decode different batches share tables, else does nothing.
    """
    from megatron.core import parallel_state

    from ultramem_megatron.megatron.optimizer.auxiliary_loss import memory_layers

    tables = [layer.values for layer in memory_layers(model)]
    if not tables or (
        parallel_state.get_expert_model_parallel_world_size()
        <= parallel_state.get_tensor_model_parallel_world_size()
    ):
        return
    # Whether anyone goes on shows at the first read of a forward pass; the others follow from it.
    while all(table.serve() for table in tables):
        pass


def _describe_ranks(
    args: Namespace, ultramem: UltraMemConfig | None, layout: InferenceLayout
) -> TableSettings:
    """Replace what belongs to the training run's machines by what these ranks have."""
    ranks = int(os.environ["WORLD_SIZE"])
    tensor_parallel = layout.tensor_parallel or ranks
    _check_tensor_parallel(args, tensor_parallel, ranks)
    args.world_size, args.tensor_model_parallel_size = ranks, tensor_parallel
    args.pipeline_model_parallel_size = args.context_parallel_size = 1
    for name in ("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout",
                 "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
                 "recompute_granularity", "recompute_method", "tensor_parallel_num_weight_shards",
                 "expert_tensor_parallel_num_weight_shards"):  # fmt: skip
        setattr(args, name, None)
    args.sequence_parallel = args.account_for_embedding_in_pipeline_split = False
    args.account_for_loss_in_pipeline_split = args.use_tp_pp_dp_mapping = False
    args.num_distributed_optimizer_instances = 1
    args.gtp_weight_remat_size = args.expert_gtp_weight_remat_size = 1
    return _describe_experts_and_tables(args, ultramem, layout)


def _describe_machine(args: Namespace, local_layers: bool) -> None:
    # The training machine may have had fused kernels that this one lacks; decoding needs none.
    for name in (
        "bias_gelu_fusion",
        "bias_swiglu_fusion",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "apply_rope_fusion",
        "gradient_accumulation_fusion",
    ):
        setattr(args, name, False)  # fmt: skip
    args.no_persist_layer_norm, args.use_cpu_initialization = True, not _has_cuda()
    if not _has_cuda():  # the other dispatchers need CUDA to learn how many tokens go where
        args.moe_token_dispatcher_type = "allgather"
    has_engine = importlib.util.find_spec("transformer_engine") is not None and _has_cuda()
    if local_layers or not has_engine:
        args.transformer_impl, args.moe_grouped_gemm = "local", False
    # Whatever part of training was captured, decoding is not.
    args.cuda_graph_impl, args.inference_cuda_graph_scope = "none", "none"
    args.cuda_graph_modules = []


def _check_cuda_graphs(args: Namespace, tables: TableSettings) -> None:
    """Raise UltraMemError where the host takes part in a decoding step: no graph holds that."""
    reasons = (
        (implementation(torch.device("cuda")) == "torch",
         "PyTorch's kernels of memories ask the host about equal scores. Unset ULTRAMEM_KERNELS"),
        (bool(args.num_experts),
         "the host tells experts how many tokens they get. Decode this model without them"),
        (tables.size > args.tensor_model_parallel_size,
         "ranks that decode different prompts agree on each read of the tables they share. Use "
         f"--ultramem-parallel-size {args.tensor_model_parallel_size}"),
        (tables.size > 1 and tables.partition == "number",
         "number-wise, the host learns how much ranks exchange. Use --ultramem-partition "
         "dimension, or --ultramem-parallel-size 1"),
    )  # fmt: skip
    for given, reason in reasons:
        if given:
            raise UltraMemError(f"--cuda-graphs: {reason}.")


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
    from ultramem_megatron.memory.tables.settings import settings_from_args

    tensor_parallel = args.tensor_model_parallel_size
    args.expert_model_parallel_size = args.expert_tensor_parallel_size = 1
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
    args.ultramem_parallel_size, args.ultramem_partition = layout.table_ranks, layout.partition
    return settings_from_args(args, ultramem)


def _initialize(args: Namespace, tables: TableSettings) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    if _has_cuda():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if _has_cuda() else "gloo")
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        expert_model_parallel_size=max(tables.size, args.expert_model_parallel_size),
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(
        args.seed, inference_rng_tracker=args.cuda_graph_impl != "none", force_reset_rng=True
    )


def _has_cuda() -> bool:
    return not registry.is_applied("cpu.devices") and torch.cuda.is_available()


def _build(args: Namespace, ultramem: UltraMemConfig | None, tables: TableSettings) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import Float16Module
    from megatron.training.argument_utils import (
        core_transformer_config_from_args,
        gpt_config_from_args,
    )

    from ultramem_megatron.megatron.model import UltraMemGPTModelConfig

    config = core_transformer_config_from_args(args)
    model_config = gpt_config_from_args(
        args, config=config, model_config_cls=UltraMemGPTModelConfig
    )
    model_config.ultramem, model_config.table_partition = ultramem, tables.partition
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = model_config.get_builder_cls()(model_config).build_model(groups)
    model = model.cuda()
    return Float16Module(config, model) if args.fp16 or args.bf16 else model


def _load_weights(model: Any, folder: str) -> None:
    from megatron.core import dist_checkpointing, parallel_state

    metadata = dist_checkpointing.load_content_metadata(folder) or {}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = {"model": model.sharded_state_dict(metadata=metadata)}
    model.load_state_dict(dist_checkpointing.load(sharded, folder)["model"])


def _tokenizer(args: Namespace) -> Any:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    path = args.tokenizer_model
    if path is not None and args.tokenizer_type == "HuggingFaceTokenizer":
        if not Path(path).exists():
            raise UltraMemError(
                f"The model's tokenizer {path!r} is not there. Run from the folder the model was "
                f"trained in, or say where it is: --tokenizer-model DIR."
            )
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the files are local
    return build_tokenizer(args)
