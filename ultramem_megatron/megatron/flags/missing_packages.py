"""Flags that need what is not here: Transformer Engine, a GPU, an optimizer's package."""

import importlib.util
from argparse import Namespace

import torch

from ultramem_megatron.errors import UltraMemError

_OWN_OPTIMIZERS = ("adam", "sgd")


def refuse_missing_packages(args: Namespace) -> None:
    """Raise UltraMemError, naming the flag and what is missing. args: Megatron's."""
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    if args.transformer_impl == "transformer_engine" and not has_engine:
        raise UltraMemError(
            "--transformer-impl transformer_engine: Transformer Engine is not installed here. "
            "Install it, or use --transformer-impl local."
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
