"""Load a checkpoint written by training onto this process, or the ranks of a torchrun, to decode.

The checkpoint may have been written in any parallel layout. Ranks first form tensor-parallel
groups, each of which decodes a batch of its own; value tables are cut over the ranks of one or
several of them. Megatron's process groups are made anew, so a process that trains must not load.
"""

import contextlib
import os
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.inference.layout import (
    InferenceLayout,
    check_cuda_graphs,
    describe_machine,
    describe_ranks,
    has_cuda,
)
from ultramem_megatron.inference.table_memory import check_table_memory, leave_tables
from ultramem_megatron.megatron.flags.process import open_process
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.finite import naming_where
from ultramem_megatron.memory.tables.settings import TableSettings
from ultramem_megatron.memory.tables.value_table import without_rows


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
    """Load the latest (or the given) iteration of a checkpoint; all ranks call it.

    Model and tokenizer are described by the flags stored in it.

    load: the folder given to --save. tokenizer_model: where the tokenizer is now, if it moved.
    cuda_graphs: see `build_model`. premultiply_values: see `prepare_for_inference`.
    Raises UltraMemError if there is no such checkpoint or tokenizer, or if the model cannot be laid
    out so.
    """
    model, args = load_model(
        load,
        ckpt_step=ckpt_step,
        layout=layout,
        cuda_graphs=cuda_graphs,
        premultiply_values=premultiply_values,
    )
    if tokenizer_model is not None:
        args.tokenizer_model = tokenizer_model
    return LoadedModel(model, open_model_tokenizer(args), args)


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
    from ultramem_megatron.megatron.checkpoint.folder import (
        checkpoint_folder,
        loaded_iteration,
        stored_args,
    )
    from ultramem_megatron.megatron.checkpoint.stored_flags import completed

    if cuda_graphs and not has_cuda():
        raise UltraMemError("--cuda-graphs: there is no NVIDIA GPU here. Decode without them.")
    loaded_iteration(load, ckpt_step)  # a mistyped folder need not wait for Megatron
    open_process()
    folder = checkpoint_folder(load, ckpt_step)
    args = completed(stored_args(folder))
    layout = layout or InferenceLayout()
    check_table_memory(layout.table_memory, cuda_graphs, premultiply_values)
    on_device = layout.table_memory == "device"
    with contextlib.nullcontext() if on_device else without_rows():
        model = build_model(args, layout, local_layers=local_layers, cuda_graphs=cuda_graphs)
    _load_weights(model, folder, layout)
    prepare_for_inference(model, premultiply_values)
    return model, args


def prepare_for_inference(model: Any, premultiply_values: bool = False) -> None:
    """Evaluation mode, and what memory layers need not repeat; weights must stay as they are.

    premultiply_values: see UltraMemLayer.prepare_for_inference.
    """
    from ultramem_megatron.memory.layer import memory_layers

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
    """The model that Megatron's flags `args` describe, on the ranks of this run, newly initialised.

    `args` is changed to describe these ranks instead of those of the training run. cuda_graphs: let
    Megatron capture its transformer block, memories included, as one CUDA graph for each number of
    requests that decode together; for dynamic batching. Raises UltraMemError.
    """
    from ultramem_megatron.megatron.flags.arguments import config_from_args
    from ultramem_megatron.megatron.hybrid.refusals import refuse_pattern

    if args.hybrid_layer_pattern is not None and cuda_graphs:
        raise UltraMemError(
            f"--cuda-graphs: a HybridModel ({args.hybrid_layer_pattern}) is decoded without them."
        )
    ultramem = config_from_args(args)
    tables = describe_ranks(args, ultramem, layout)
    describe_machine(args, local_layers)
    refuse_pattern(args, ultramem)
    if cuda_graphs:
        check_cuda_graphs(args, tables)
        args.cuda_graph_impl, args.inference_cuda_graph_scope = "local", "block"
        args.cuda_graph_warmup_steps = 3  # the first makes caches, which a capture must not
    _initialize(args, tables)
    model = _build(args, ultramem, tables)
    if tables.size > args.tensor_model_parallel_size:
        from ultramem_megatron.memory.tables.value_table import value_tables

        for table in value_tables(model).values():
            table.read_in_lockstep()
    return model


def _initialize(args: Namespace, tables: TableSettings) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    if has_cuda():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if has_cuda() else "gloo")
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


def _build(args: Namespace, ultramem: UltraMemConfig | None, tables: TableSettings) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import Float16Module

    from ultramem_megatron.megatron.model_from_flags import fill, transformer_from_args

    config = transformer_from_args(args)
    model_config = fill(args, config, ultramem, tables)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = model_config.get_builder_cls()(model_config).build_model(groups)
    model = model.cuda()
    return Float16Module(config, model) if args.fp16 or args.bf16 else model


def _load_weights(model: Any, folder: str, layout: InferenceLayout) -> None:
    from megatron.core import parallel_state
    from megatron.core.utils import get_model_config

    from ultramem_megatron.megatron.checkpoint.weights import content_metadata, load_weights

    metadata = content_metadata(folder)
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = model.sharded_state_dict(metadata=metadata)
    left = {}
    if layout.table_memory != "device":
        left = leave_tables(model, sharded, folder, layout)
    loaded = load_weights(sharded, folder, get_model_config(model).num_moe_experts)
    with naming_where(folder):
        model.load_state_dict(loaded | left)


def open_model_tokenizer(args: Namespace) -> Any:
    """The tokenizer of a model's flags. Raises UltraMemError where it cannot be opened."""
    from ultramem_megatron.data.open_tokenizer import open_tokenizer

    path = args.tokenizer_model
    if path is not None and args.tokenizer_type == "HuggingFaceTokenizer":
        if not Path(path).exists():
            raise UltraMemError(
                f"The model's tokenizer {path!r} is not there. Run from the folder the model was "
                f"trained in, or say where it is: --tokenizer-model DIR."
            )
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the files are local
    return open_tokenizer(args)
