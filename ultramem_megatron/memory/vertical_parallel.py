"""UltraMemV2's tables as its authors' `vertical_parallel` leaves them, cut by columns over ranks.

Of every P neighbouring ranks each has one of P equal ranges of the tables' columns, and all else
whole; further P ranks have the same again. A checkpoint is a folder `rank_{N}` for each of them,
with a `model.pt` of the whole model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.trust import fault_of
from ultramem_megatron.memory.foreign import Sizes, tensors

TABLES = ("full_memory_layer.values_for_look_up", "full_memory_layer.pre_values_for_look_up")
_WHAT = "UltraMemV2"
_MEMORIES = ("full_memory_layer.", "mem_blocks.")

type Given = str | Path | Mapping[Any, Any] | Sequence[Mapping[str, Any]]
"""A state dict, those of all ranks (a list, or by rank), or the folder of a checkpoint."""


def whole_tables(given: Given, sizes: Sizes) -> dict[str, Tensor]:
    """One state dict with whole tables. Raises UltraMemError for parts that do not fit together."""
    loaded: Any = _read(Path(given)) if isinstance(given, str | Path) else given
    if not isinstance(loaded, Mapping):
        return _joined([tensors(one) for one in loaded], sizes)
    if any(isinstance(value, Mapping) for value in loaded.values()):
        return _joined([tensors(one) for one in _in_order(loaded)], sizes)
    sizes.refuse(
        "vertical_parallel",
        why="these tables are cut by columns, and this is one state dict; pass those of all ranks, "
        "as a list or by rank, or the checkpoint's folder",
    )
    return tensors(loaded)


def cut_official_v2(state: Mapping[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """State dicts of so many ranks, their tables cut by columns, of one (or of its gradients)."""
    for name in TABLES:
        if name in state and (ranks < 1 or state[name].shape[1] % ranks):
            raise UltraMemError(
                f"{_WHAT}: {name} has {state[name].shape[1]} columns, which {ranks} ranks cannot "
                f"share equally. Use a divisor."
            )
    cut = {name: state[name].chunk(ranks, dim=1) for name in TABLES if name in state}
    return [
        {
            name: (cut[name][rank] if name in cut else tensor).clone().contiguous()
            for name, tensor in state.items()
        }
        for rank in range(ranks)
    ]


def _read(folder: Path) -> Any:
    """The state dicts of a checkpoint's folder: by rank, or the one there is."""
    found = {part.parent.name: part for part in folder.glob("rank_*/model.pt")}
    if found:
        return {rank: _of_memories(part) for rank, part in found.items()}
    if (folder / "model.pt").is_file():
        return _of_memories(folder / "model.pt")
    raise UltraMemError(
        f"{_WHAT}: {folder} has no rank_0/model.pt, nor a model.pt. Pass the folder of a step, as "
        f"the authors' trainer saved it."
    )


def _of_memories(file: Path) -> dict[str, Tensor]:
    """Entries of the memories, without what precedes their names in the whole model."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # bytes that were no state dict raise any of them
        raise UltraMemError(f"{_WHAT}: {file} {fault_of(error)}. Nothing of it was run.") from None
    if not isinstance(loaded, Mapping):
        raise UltraMemError(f"{_WHAT}: {file} holds a {type(loaded).__name__}, no state dict.")
    starts = {name: max(name.find(part) for part in _MEMORIES) for name in loaded}
    return {name[at:]: loaded[name] for name, at in starts.items() if at >= 0}


def _in_order(by_rank: Mapping[Any, Any]) -> list[Mapping[str, Any]]:
    numbered = {str(rank).removeprefix("rank_"): one for rank, one in by_rank.items()}
    missing = [rank for rank in range(len(numbered)) if str(rank) not in numbered]
    if missing:
        raise UltraMemError(
            f"{_WHAT}: of {len(numbered)} ranks, named {', '.join(sorted(numbered))}, number "
            f"{missing[0]} is missing. Pass all, numbered from 0 or rank_0 on."
        )
    return [numbered[str(rank)] for rank in range(len(numbered))]


def _joined(ranks: Sequence[Mapping[str, Tensor]], sizes: Sizes) -> dict[str, Tensor]:
    together = _ranks_together(ranks, sizes)
    _check_equal(ranks, together)
    whole = dict(ranks[0])
    for name in TABLES:
        if name in whole:
            whole[name] = torch.cat([one[name] for one in ranks[:together]], dim=1)
    return whole


def _ranks_together(ranks: Sequence[Mapping[str, Tensor]], sizes: Sizes) -> int:
    """P, off the columns that the first rank has."""
    width = sizes.get("vdim")
    columns = ranks[0][TABLES[0]].shape[-1] if ranks and TABLES[0] in ranks[0] else 0
    together = width // columns if columns else 0
    if not together or together * columns != width or len(ranks) % together:
        raise UltraMemError(
            f"{_WHAT}: {len(ranks)} ranks, of which the first has {columns or 'no'} columns of "
            f"{TABLES[0]}; vdim is {width}. Pass the state dicts of all ranks, and the sizes "
            f"they were made with."
        )
    sizes.require(
        sizes.get("mem_parallel_size", together) == together,
        "mem_parallel_size",
        f"{together}, vdim over the columns of a rank",
    )
    if together > 1:
        fits = sizes.get("tucker_multihead") in (1, 2) and not together % sizes.get(
            "tucker_multihead"
        )
        sizes.require(
            fits, "tucker_multihead", f"1 or 2, and divide the {together} ranks, as in their code"
        )
    return together


def _check_equal(ranks: Sequence[Mapping[str, Tensor]], together: int) -> None:
    """Everything but the tables is the same on all ranks, and tables on those P apart."""
    first = ranks[0]
    for rank, one in enumerate(ranks):
        if one.keys() != first.keys():
            _refuse(rank, min(one.keys() ^ first.keys()), 0)
        for name, tensor in one.items():
            if (tensor.shape, tensor.dtype) != (first[name].shape, first[name].dtype):
                _refuse(rank, name, 0)
            same = rank % together if name in TABLES else 0
            if not tensor.equal(ranks[same][name]):
                _refuse(rank, name, same)


def _refuse(rank: int, name: str, other: int) -> None:
    raise UltraMemError(
        f"{_WHAT}: rank {rank} and rank {other} do not fit together, by {name}: it is missing in "
        f"one, or of another shape, dtype or content. Pass the state dicts of one step."
    )
