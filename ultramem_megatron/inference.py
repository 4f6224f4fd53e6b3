"""Load a checkpoint written by training into one process, ready to decode with a KV cache."""

import importlib.util
import os
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.patches import registry


class LoadedModel(NamedTuple):
    """A GPT in evaluation mode, its tokenizer, and the flags it was trained with."""

    model: Any
    tokenizer: Any
    args: Namespace


def load_for_inference(
    load: str, *, ckpt_step: int | None = None, tokenizer_model: str | None = None
) -> LoadedModel:
    """Load the latest (or the given) iteration of a `torch_dist` checkpoint.

    The checkpoint may have been written in any parallel layout; it is loaded whole, into this
    process. Model and tokenizer are described by the flags stored in it.

    load: the folder given to --save. tokenizer_model: where the tokenizer is now, if it moved.
    Raises UltraMemError if there is no such checkpoint or tokenizer.
    """
    from ultramem_megatron.compatibility import checkpoint_folder, stored_args
    from ultramem_megatron.pretrain import set_single_process_environment

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UltraMemError(
            f"Inference loads the whole model into one process, but WORLD_SIZE is "
            f"{os.environ['WORLD_SIZE']}. Start it with python, not torchrun."
        )
    set_single_process_environment()
    registry.apply_all()
    folder = checkpoint_folder(load, ckpt_step)
    args = stored_args(folder)
    _describe_one_process(args, tokenizer_model)
    _initialize(args.seed)
    model = _build(args)
    _load_weights(model, folder)
    return LoadedModel(model.eval(), _tokenizer(args), args)


def _describe_one_process(args: Namespace, tokenizer_model: str | None) -> None:
    """Replace what belongs to the training run's machines by what this process has."""
    sizes = ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel",
             "expert_model_parallel", "expert_tensor_parallel")  # fmt: skip
    for name in sizes:
        setattr(args, f"{name}_size", 1)
    for name in ("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout",
                 "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
                 "recompute_granularity", "recompute_method"):  # fmt: skip
        setattr(args, name, None)
    args.sequence_parallel = args.account_for_embedding_in_pipeline_split = False
    args.account_for_loss_in_pipeline_split = False
    if tokenizer_model is not None:
        args.tokenizer_model = tokenizer_model
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
    args.no_persist_layer_norm = args.use_cpu_initialization = True
    if importlib.util.find_spec("transformer_engine") is None or not _has_cuda():
        args.transformer_impl = "local"


def _initialize(seed: int) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():
        dist.init_process_group("nccl" if _has_cuda() else "gloo", rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _has_cuda() -> bool:
    return not registry.is_applied("cpu_devices") and torch.cuda.is_available()


def _build(args: Namespace) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import Float16Module
    from megatron.training.argument_utils import (
        core_transformer_config_from_args,
        gpt_config_from_args,
    )

    from ultramem_megatron.arguments import config_from_args
    from ultramem_megatron.model import UltraMemGPTModelConfig

    config = core_transformer_config_from_args(args)
    model_config = gpt_config_from_args(
        args, config=config, model_config_cls=UltraMemGPTModelConfig
    )
    model_config.ultramem = config_from_args(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # One process: the table group has one rank, whatever the run had.
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
