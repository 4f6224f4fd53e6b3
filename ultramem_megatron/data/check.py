"""Do data sets and flags belong together? Found out before a model is built.

What Megatron takes on trust (a file cut short, ids of another vocabulary, validation without data)
comes up when a batch needs it, perhaps after days, or never.
"""

import math
import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import Any

from ultramem_megatron.data.index_file import Index, check_tokens
from ultramem_megatron.errors import UltraMemError

_TRAIN, _VALID = 0, 1  # places in a split
_PARTS = ("training", "validation", "test")
_FLAGS = ("--train-data-path", "--valid-data-path")
_WAYS_OUT = ("", ", or --eval-iters 0 for no validation")


def check_data(args: Namespace) -> None:
    """Check every data set that Megatron's arguments name.

    Every rank looks at sizes and headers, rank 0 at samples of the contents, too.

    Raises:
        UltraMemError: names the file or flag, what was found and what was expected.
    """
    from megatron.training.utils import get_blend_and_blend_per_split

    if args.mock_data or getattr(args, "sft", False):  # sft: other formats
        return
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except OSError as error:
        raise UltraMemError(f"{error.filename}: {error.strerror}.") from None
    if blend is None and not any(per_split or ()):
        raise UltraMemError("there is no data. Give --data-path, --train-data-path or --mock-data.")
    vocab_size = args.padded_vocab_size if os.environ.get("RANK", "0") == "0" else None
    for prefixes, _ in filter(None, [blend, *(per_split or ())]):
        check_prefixes(prefixes, vocab_size)
    _check_splits(args, blend, per_split)


def check_prefixes(prefixes: Iterable[str], vocab_size: int | None = None) -> None:
    """Check PREFIX.idx and PREFIX.bin of each; those of an object store (s3://...) are left out.

    vocab_size: entries of the model's vocabulary; None: contents are not looked at.

    Raises:
        UltraMemError: see `check_data`.
    """
    for prefix in prefixes:
        if "://" in prefix:
            continue
        if not prefix:
            raise UltraMemError("a data path is empty. Give the path of a .bin and .idx file.")
        try:
            index = Index.read(prefix)
            index.check_size()
            if vocab_size is not None:
                index.check_body()
                check_tokens(index, vocab_size)
        except OSError as error:
            raise UltraMemError(
                f"{error.filename}: {error.strerror}. A data set is given as the path of its .bin "
                f"and .idx without the ending."
            ) from None


def _check_splits(args: Namespace, blend: Any, per_split: Sequence[Any] | None) -> None:
    """Refuse training or validation that is asked for and has no documents."""
    validates = args.full_validation or args.eval_iters > 0
    for place, wanted in ((_TRAIN, not args.skip_train), (_VALID, validates)):
        if not wanted:
            continue
        what, way_out = _PARTS[place], _WAYS_OUT[place]
        if per_split is not None and per_split[place] is None:
            raise UltraMemError(f"there is no data for {what}. Give {_FLAGS[place]}{way_out}.")
        if blend is not None and _shares(args.split)[place] == 0:
            raise UltraMemError(
                f"--split {args.split} leaves no data for {what}. Give it a share{way_out}."
            )
    for prefix in blend[0] if blend is not None else ():
        if "://" not in prefix:
            _check_rounding(args.split, prefix, Index.read(prefix).documents)


def _check_rounding(split: str, prefix: str, documents: int) -> None:
    """Refuse a share of so few documents that none is left; Megatron's index builder dies of it."""
    end = 0.0
    for what, share in zip(_PARTS, _shares(split), strict=True):
        first, end = end, end + share
        if share and round(first * documents) == round(end * documents):  # as Megatron rounds
            raise UltraMemError(
                f"--split {split} leaves none of the {documents} documents of {prefix} for {what}. "
                "Give it a larger share, or 0 for no such data."
            )


def _shares(split: str) -> Sequence[float]:
    from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split

    try:
        shares: Sequence[float] = parse_and_normalize_split(split)
    except (AssertionError, ValueError, ZeroDivisionError):
        shares = ()
    if not all(map(math.isfinite, shares)) or not shares:
        raise UltraMemError(
            f"--split {split}: must be three numbers, for training, validation and test, as 98,2,0."
        )
    return shares
