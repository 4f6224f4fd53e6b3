"""Flags that need what is not here: Transformer Engine, a GPU, an optimizer's package.

Megatron ends such runs too, but in an import error, an AttributeError or endless recursion, after
it has built the model.
"""

import importlib.util
from argparse import Namespace
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any

import torch
from packaging.version import Version

from ultramem_megatron.errors import UltraMemError

_OWN_OPTIMIZERS = ("adam", "sgd")
_LOW_PRECISION = {"fp8": "--fp8-format", "fp4": "--fp4-format"}
"""Without Transformer Engine Megatron ignores them."""
_OF_TRANSFORMER_ENGINE = _LOW_PRECISION | {
    "use_precision_aware_optimizer": "--use-precision-aware-optimizer",
    "optimizer_cpu_offload": "--optimizer-cpu-offload",
    "save_activations_interval": "--save-activations-interval",
    "moe_latent_size": "--moe-latent-size",
    "tp_comm_overlap": "--tp-comm-overlap",
    "delay_wgrad_compute": "--delay-wgrad-compute",
}
"""Whatever the layers are made of."""
_OF_ITS_LAYERS = _LOW_PRECISION | {
    "dataloader_inter_document_masking": "--dataloader-inter-document-masking",
    "sft": "--sft",
    "qk_clip": "--qk-clip",
    "log_max_attention_logit": "--log-max-attention-logit",
}
"""Megatron's own layers (--transformer-impl local) do not have these."""


def refuse_missing_packages(args: Namespace) -> None:
    """Raise UltraMemError, naming the flag and what is missing. args: Megatron's."""
    parts = (_of_gpu, _of_engine, _of_own_layers, _of_optimizer, _others)
    for message in chain.from_iterable(part(args) for part in parts):
        raise UltraMemError(message)


def refuse_low_precision(settings: Mapping[str, Any]) -> None:
    """Raise UltraMemError for fp8 or fp4 in a config, where nothing computes in them."""
    for name in _LOW_PRECISION:
        if settings.get(name) is not None and not _has("transformer_engine"):
            raise UltraMemError(
                f"{name}={settings[name]} needs Transformer Engine, which is not installed. Leave "
                f"it out."
            )


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _of_gpu(args: Namespace) -> Iterator[str]:
    if _has_gpu():
        return
    if args.cuda_graph_impl != "none":
        yield f"--cuda-graph-impl {args.cuda_graph_impl}: torch sees no GPU here. Drop the flag."
    if args.distributed_backend == "nccl":
        yield "--distributed-backend nccl: torch sees no GPU here. Use --distributed-backend gloo."
    if args.optimizer_cpu_offload:
        yield (
            "--optimizer-cpu-offload keeps a GPU's optimizer state on its host, and torch sees no "
            "GPU here. Drop the flag."
        )
    if args.async_save and args.async_strategy != "mcore":
        yield (
            f"--async-strategy {args.async_strategy}: its writer copies from a GPU, and torch sees "
            f"none here. Use --async-strategy mcore."
        )
    if args.ckpt_fully_parallel_load:
        yield (
            "--ckpt-fully-parallel-load: Megatron does it through CUDA, and torch sees no GPU "
            "here. Drop the flag."
        )


def _of_engine(args: Namespace) -> Iterator[str]:
    if _has("transformer_engine"):
        return
    if args.transformer_impl == "transformer_engine":
        yield (
            "--transformer-impl transformer_engine: Transformer Engine is not installed here. "
            "Install it, or use --transformer-impl local."
        )
    for name, flag in _OF_TRANSFORMER_ENGINE.items():
        if getattr(args, name, None):
            yield f"{flag} needs Transformer Engine, which is not installed. Drop the flag."


def _of_own_layers(args: Namespace) -> Iterator[str]:
    if args.transformer_impl != "local":
        return
    for name, flag in _OF_ITS_LAYERS.items():
        if getattr(args, name, False):
            yield (
                f"{flag} needs --transformer-impl transformer_engine: Megatron's own layers do not "
                f"have it."
            )
    if args.qk_l2_norm and not args.num_experts:
        yield (
            "--qk-l2-norm does nothing in Megatron's own dense layers (--transformer-impl local). "
            "Drop the flag, or use --qk-layernorm."
        )
    if args.num_experts and args.add_bias_linear:
        yield (
            "--num-experts: experts of Megatron's own layers (--transformer-impl local) do not "
            "train with biases. Add --disable-bias-linear."
        )
    if args.recompute_modules and "mlp" in args.recompute_modules and args.add_bias_linear:
        yield (
            "--recompute-modules mlp: MLPs of Megatron's own layers (--transformer-impl local) are "
            "not recomputed with biases. Add --disable-bias-linear, or leave mlp out."
        )


def _of_optimizer(args: Namespace) -> Iterator[str]:
    if args.optimizer in _OWN_OPTIMIZERS:
        return
    given = f"--optimizer {args.optimizer}"
    if not _has("emerging_optimizers"):
        yield (
            f"{given} needs the package emerging-optimizers, which is not installed. Install it, "
            f"or use --optimizer adam."
        )
    if args.optimizer == "adaptive_muon" and _emerging_version() >= Version("0.3"):
        yield (
            f"{given}: Megatron builds it for emerging-optimizers before 0.3, but here is "
            f"{_emerging_version()}. Install an older one, or use --optimizer muon."
        )
    if args.optimizer == "soap" and args.save and not args.no_save_optim:
        yield (
            f"{given}: Megatron cannot save its state, whose matrices have other shapes than the "
            f"weights. Use muon or adam, or add --no-save-optim."
        )
    if args.fp16:
        yield f"{given} does not train in --fp16. Use --bf16."
    if args.use_layer_wise_distributed_optimizer and not args.bf16:
        yield (
            f"{given} with --use-distributed-optimizer (dist_muon) trains in bf16 only. Add "
            f"--bf16, or drop --use-distributed-optimizer."
        )


def _emerging_version() -> Version:
    try:
        return Version(version("emerging-optimizers"))
    except PackageNotFoundError:
        return Version("0")


def _others(args: Namespace) -> Iterator[str]:
    if args.full_validation and not args.multiple_validation_sets:
        yield (
            "--full-validation: Megatron ends in a TypeError when it evaluates one set so. Add "
            "--multiple-validation-sets, or drop it."
        )
    over_ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size > 1
    samples = getattr(args, "eval_micro_batch_size", args.micro_batch_size)
    if args.full_validation and over_ranks and samples != 1:
        yield (
            f"--eval-micro-batch-size {samples} (by default --micro-batch-size) "
            f"with --full-validation and tensor- or pipeline-parallel ranks, to which Megatron "
            f"sends samples one by one. Add --eval-micro-batch-size 1 and a "
            f"--eval-global-batch-size that is a multiple of the data-parallel ranks."
        )
    if args.multiple_validation_sets and not args.full_validation and args.eval_iters:
        yield (
            "--multiple-validation-sets: Megatron evaluates several sets as wholes only. Add "
            "--full-validation, or --eval-iters 0."
        )
    if args.num_experts and args.moe_token_dispatcher_type == "flex" and not _has("deep_ep"):
        yield (
            "--moe-token-dispatcher-type flex needs the package deep_ep, which is not installed. "
            "Use alltoall."
        )
    nvrx = args.async_save and args.async_strategy == "nvrx"
    if nvrx and not _has("nvidia_resiliency_ext"):
        yield (
            "--async-save needs the package nvidia-resiliency-ext, which is not installed. Install "
            "it, or add --async-strategy mcore."
        )
