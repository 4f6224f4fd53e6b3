"""Megatron's and our flags as its parser reads them, from words and not from the command line."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from unittest import mock

from ultramem_megatron.megatron.flags import machine_flags
from ultramem_megatron.megatron.flags.arguments import add_ultramem_arguments
from ultramem_megatron.megatron.flags.process import open_process
from ultramem_megatron.megatron.flags.refused_by_megatron import megatron_refuses

# Megatron's parser asks for what only a training run has.
_UNUSED = (
    "--micro-batch-size",
    "1",
    "--train-iters",
    "1",
    "--lr",
    "1e-4",
    "--tokenizer-type",
    "NullTokenizer",
    "--mock-data",
)


def parse_words(words: Sequence[str]) -> Namespace:
    """Flags by name, unchecked. Raises UltraMemError for a flag or value that nobody knows."""
    from megatron.training.arguments import parse_args

    # Megatron reads sys.argv itself.
    with mock.patch.object(sys, "argv", [sys.argv[0], *words]), megatron_refuses():
        args: Namespace = parse_args(add_ultramem_arguments)
    return args


def args_from_flags(flags: Sequence[str]) -> Namespace:
    """Flags parsed, checked and completed for this machine as for training; starts nothing.

    Flags of the training itself may be left out. Raises UltraMemError for our own.
    """
    open_process()
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
    from megatron.training import arguments

    args = parse_words([*_UNUSED, *machine_flags.complete(flags)])  # the last of a flag wins
    with megatron_refuses():
        arguments.validate_args(args)
    args.padded_vocab_size = vocab_size_with_padding(args.vocab_size, args)
    return args
