"""The tokenizer that Megatron's flags name, or one line that says why it is none."""

from argparse import Namespace
from typing import Any

from ultramem_megatron.errors import UltraMemError


def open_tokenizer(args: Namespace) -> Any:
    """Megatron's tokenizer of `args`, which get their padded vocabulary where they have none.

    Raises:
        UltraMemError: it is not there, damaged, or asks for code of its own.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    try:
        return build_tokenizer(args)
    except Exception as error:  # each library has its own
        raise UltraMemError(
            f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model}: "
            f"{' '.join(str(error).split()) or type(error).__name__}"
        ) from error
