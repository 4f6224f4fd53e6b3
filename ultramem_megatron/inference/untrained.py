"""A model from Megatron's flags alone, newly initialised: for benchmarks, imports and tests."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from ultramem_megatron.inference.layout import InferenceLayout
from ultramem_megatron.inference.loading import build_model
from ultramem_megatron.megatron.flags.parse import args_from_flags


def untrained_model(
    flags: Sequence[str], layout: InferenceLayout | None = None, *, local_layers: bool = False
) -> tuple[Any, Namespace]:
    """A model in evaluation mode with initial weights, and its flags; see `build_model`."""
    args = args_from_flags(flags)
    model = build_model(args, layout or InferenceLayout(), local_layers=local_layers)
    return model.eval(), args
