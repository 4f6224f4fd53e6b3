"""A model from Megatron's flags alone, newly initialised: for benchmarks, imports and tests."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from ultramem_megatron.inference.loading import InferenceLayout, build_model
from ultramem_megatron.megatron.flags import machine_flags
from ultramem_megatron.patches import registry

# Megatron's parser asks for what only a training run has.
_UNUSED = ("--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-4",
           "--tokenizer-type", "NullTokenizer", "--mock-data")  # fmt: skip


def args_from_flags(flags: Sequence[str]) -> Namespace:
    """Megatron's (and our) flags, parsed and checked as for training; starts nothing.

    Flags of the training itself may be left out. Raises UltraMemError for our own.
    """
    from ultramem_megatron.training.pretrain import set_single_process_environment

    set_single_process_environment()
    registry.apply_all()
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
    from megatron.training.arguments import parse_args, validate_args

    from ultramem_megatron.megatron.flags.arguments import add_ultramem_arguments

    given = sys.argv
    sys.argv = [sys.argv[0], *_UNUSED, *machine_flags.complete(flags)]  # the last of a flag wins
    try:
        args: Namespace = parse_args(add_ultramem_arguments)
        validate_args(args)
    finally:
        sys.argv = given
    args.padded_vocab_size = vocab_size_with_padding(args.vocab_size, args)
    return args


def untrained_model(
    flags: Sequence[str], layout: InferenceLayout | None = None, *, local_layers: bool = False
) -> tuple[Any, Namespace]:
    """A model in evaluation mode with initial weights, and its flags; see `build_model`."""
    args = args_from_flags(flags)
    model = build_model(args, layout or InferenceLayout(), local_layers=local_layers)
    return model.eval(), args
