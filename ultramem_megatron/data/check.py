"""Do data sets and flags belong together? Found out before a model is built.

What Megatron takes on trust (a file cut short, ids of another vocabulary, validation without data)
comes up when a batch needs it, perhaps after days, or never.
"""

import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import Any

from ultramem_megatron.data.index_file import Index, check_tokens
from ultramem_megatron.errors import UltraMemError

_TRAIN, _VALID = 0, 1  # places in a split


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
    asked = [(_TRAIN, "training", not args.skip_train)]
    validates = args.full_validation or args.eval_iters > 0
    asked += [(_VALID, "validation", validates)]
    for place, what, wanted in asked:
        if not wanted or (blend is None and per_split is None):
            continue
        way_out = " or --eval-iters 0 for no validation" if place == _VALID else ""
        if per_split is not None:
            if per_split[place] is None:
                flag = ("--train-data-path", "--valid-data-path")[place]
                raise UltraMemError(f"there is no data for {what}. Give {flag}{way_out}.")
        else:
            _check_share(args.split, place, what, blend[0], way_out)


def _check_share(split: str, place: int, what: str, prefixes: Sequence[str], way_out: str) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split

    try:
        shares = parse_and_normalize_split(split)
    except (AssertionError, ValueError, ZeroDivisionError):
        raise UltraMemError(
            f"--split {split}: must be three numbers, for training, validation and test, as 98,2,0."
        ) from None
    first, end = sum(shares[:place]), sum(shares[: place + 1])
    for prefix in prefixes:
        if "://" in prefix:
            continue
        documents = Index.read(prefix).documents
        # As Megatron rounds.
        if round(end * documents) <= round(first * documents):
            raise UltraMemError(
                f"--split {split}: leaves none of the {documents} documents of {prefix} for "
                f"{what}. Give {what} a share of them{way_out}."
            )
