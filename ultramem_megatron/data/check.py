"""Are indexed data sets whole? Sizes and headers, compared before a model is built.

Megatron maps PREFIX.idx and PREFIX.bin into memory and trusts them: a file cut short is found when
a batch needs what is missing, perhaps after days, and an index of other data gives other text.
"""

import os
import struct
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from ultramem_megatron.errors import UltraMemError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
"""Version, code of the token type, sequences, documents; see Megatron's `indexed_dataset`."""
_LENGTH, _POINTER = struct.Struct("<i"), struct.Struct("<q")
_VERSION = 1


def check_data(args: Namespace) -> None:
    """Check every data set that Megatron's arguments name.

    Raises:
        UltraMemError: names the file, what was found and what was expected.
    """
    from megatron.training.utils import get_blend_and_blend_per_split

    if args.mock_data or getattr(args, "sft", False):  # sft: other formats
        return
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except OSError as error:
        raise UltraMemError(f"{error.filename}: {error.strerror}.") from None
    for prefixes, _ in filter(None, [blend, *(per_split or ())]):
        check_prefixes(prefixes)


def check_prefixes(prefixes: Iterable[str]) -> None:
    """Check PREFIX.idx and PREFIX.bin of each; those of an object store (s3://...) are left out.

    Raises:
        UltraMemError: see `check_data`.
    """
    for prefix in prefixes:
        if "://" in prefix:
            continue
        index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        try:
            expected, found = _expected_bytes(index), tokens.stat().st_size
            os.close(os.open(tokens, os.O_RDONLY))
        except OSError as error:
            raise UltraMemError(
                f"{error.filename}: {error.strerror}. A data set is given as the path of its .bin "
                f"and .idx without the ending."
            ) from None
        if found != expected:
            raise UltraMemError(
                f"{tokens} has {found:,} bytes, its index {index.name} describes {expected:,}: one "
                f"of them is cut short, or they are of different data. Copy or make both again."
            )


def _expected_bytes(index: Path) -> int:
    """Bytes of the tokens that an index describes."""
    from megatron.core.datasets.indexed_dataset import DType

    size = index.stat().st_size
    with index.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise UltraMemError(f"{index} is not an index of Megatron's: it begins otherwise.")
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise UltraMemError(f"{index} is cut short: {size} bytes.")
        version, code, sequences, documents = _HEADER.unpack(header)
        if version != _VERSION:
            raise UltraMemError(f"{index} has version {version}; {_VERSION} is known.")
        if sequences == 0:
            raise UltraMemError(f"{index} holds no documents.")
        lengths = file.tell()
        pointers = lengths + sequences * _LENGTH.size
        end = pointers + (sequences + documents) * _POINTER.size
        if size < end:
            raise UltraMemError(f"{index} is cut short: {size:,} bytes of at least {end:,}.")
        file.seek(pointers - _LENGTH.size)
        (last_length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        file.seek(pointers + (sequences - 1) * _POINTER.size)
        (last_pointer,) = _POINTER.unpack(file.read(_POINTER.size))
    bytes_per_token = DType.size(DType.dtype_from_code(code))
    return int(last_pointer + last_length * bytes_per_token)
