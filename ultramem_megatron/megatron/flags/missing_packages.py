"""Flags that need what is not here: Transformer Engine, a GPU, an optimizer's package."""

import importlib.util
from argparse import Namespace

import torch

from ultramem_megatron.errors import UltraMemError

_OWN_OPTIMIZERS = ("adam", "sgd")
_OF_TRANSFORMER_ENGINE = {
    "multi_latent_attention": "--multi-latent-attention",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
}
"""Megatron's own layers (--transformer-impl local) do not have these."""


def refuse_missing_packages(args: Namespace) -> None:
    """Raise UltraMemError, naming the flag and what is missing. args: Megatron's."""
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    if args.transformer_impl == "transformer_engine" and not has_engine:
        raise UltraMemError(
            "--transformer-impl transformer_engine: Transformer Engine is not installed here. "
            "Install it, or use --transformer-impl local."
        )
    for name, flag in _OF_TRANSFORMER_ENGINE.items():
        if args.transformer_impl == "local" and getattr(args, name, False):
            raise UltraMemError(
                f"{flag} needs --transformer-impl transformer_engine: Megatron's own layers do not "
                f"have it."
            )
    if args.transformer_impl == "local" and args.num_experts and args.add_bias_linear:
        raise UltraMemError(
            "--num-experts: experts of Megatron's own layers (--transformer-impl local) do not "
            "train with biases. Add --disable-bias-linear."
        )
    if args.distributed_backend == "nccl" and not torch.cuda.is_available():
        raise UltraMemError(
            "--distributed-backend nccl: torch sees no GPU here. Use --distributed-backend gloo."
        )
    if (
        args.optimizer not in _OWN_OPTIMIZERS
        and importlib.util.find_spec("emerging_optimizers") is None
    ):
        raise UltraMemError(
            f"--optimizer {args.optimizer} needs the package emerging-optimizers, which is not "
            f"installed. Install it, or use --optimizer adam."
        )
