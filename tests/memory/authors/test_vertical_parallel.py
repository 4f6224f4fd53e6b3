"""UltraMemV2 checkpoints whose tables are cut by columns over ranks, there and back."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.memory.authors import slow
from tests.memory.authors.test_family import V2
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.convert import cut_official_v2, load_official_v2, to_official_v2
from ultramem_megatron.memory.foreign import ForeignMemories

CFG: dict[str, Any] = V2 | {
    "vdim": 8,
    "pre_vdim": 4,
    "head": 2,
    "vertical_parallel": True,
    "mem_parallel_size": 2,
    "key_expand_time": 2,
    "value_expand_time": 4,
}
VALUES, PRE = (f"full_memory_layer.{kind}_for_look_up" for kind in ("values", "pre_values"))


def _cut(state: dict[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """As the authors' constructor: rank i has columns from i * width / ranks on."""
    parts = []
    for rank in range(ranks):
        part = {name: tensor.clone() for name, tensor in state.items()}
        for name in (VALUES, PRE):
            width = state[name].shape[1] // ranks
            part[name] = state[name][:, rank * width : (rank + 1) * width].clone()
        parts.append(part)
    return parts


def _equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def _same_memories(memories: ForeignMemories, state: dict[str, Tensor]) -> None:
    _equal(to_official_v2(memories), state)
    whole = load_official_v2(state, CFG | {"vertical_parallel": False})
    x = torch.randn(1, 3, CFG["hidden_size"], dtype=torch.float64)
    outputs = [torch.stack([layer(x) for layer in m.layers]) for m in (memories, whole)]
    assert torch.equal(*outputs)
    for out in outputs:
        out.square().sum().backward()
    _equal(memories.authors_gradients(), whole.authors_gradients())


@pytest.mark.parametrize("ranks", [2, 4])
def test_tables_of_all_ranks_are_one_and_are_cut_again(ranks: int, tmp_path: Path) -> None:
    """Four ranks are two groups with the same tables."""
    state = slow.v2_weights(CFG)
    parts = _cut(state, 2) * (ranks // 2)
    by_rank = {f"rank_{rank}": part for rank, part in enumerate(parts)}
    for rank, part in by_rank.items():
        (tmp_path / rank).mkdir()
        model = {f"transformer.{name}": tensor for name, tensor in part.items()}
        torch.save(model | {"transformer.wte.weight": torch.ones(3)}, tmp_path / rank / "model.pt")
    numbered = dict(reversed([*enumerate(parts)]))
    for given in (parts, by_rank, numbered, tmp_path, str(tmp_path)):
        memories = load_official_v2(given, CFG)
        _same_memories(memories, state)
    for found, part in zip(cut_official_v2(to_official_v2(memories), 2), parts, strict=False):
        _equal(found, part)
    gradients = memories.authors_gradients()
    cut = [part[VALUES] for part in cut_official_v2(gradients, 4)]
    assert torch.equal(torch.cat(cut, 1), gradients[VALUES])
    assert not any(part.is_set_to(gradients[VALUES]) for part in cut)


def test_a_folder_without_ranks_has_whole_tables(tmp_path: Path) -> None:
    state = slow.v2_weights(CFG)
    torch.save({f"transformer.{name}": t for name, t in state.items()}, tmp_path / "model.pt")
    _equal(to_official_v2(load_official_v2(tmp_path, CFG | {"vertical_parallel": False})), state)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = slow.v2_weights(CFG)
    two, four = _cut(state, 2), _cut(state, 4)
    without = {name: tensor for name, tensor in two[1].items() if name != PRE}
    keys = "mem_blocks.1.keys"
    other_keys = two[1] | {keys: two[1][keys] + 1}
    wide = two[1] | {VALUES: state[VALUES]}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (two[0], {}, "cut by columns, and this is one state dict"),
        (two[:1], {}, "1 ranks, of which the first has 4 columns"),
        ([], {}, "0 ranks, of which the first has no columns"),
        ([two[0], without], {}, f"rank 1 and rank 0 do not fit together, by {PRE}"),
        ([two[0], wide], {}, f"rank 1 and rank 0 do not fit together, by {VALUES}"),
        ([two[0], other_keys], {}, f"rank 1 and rank 0 do not fit together, by {keys}"),
        ([*two, two[1], two[1]], {}, f"rank 2 and rank 0 do not fit together, by {VALUES}"),
        ({0: two[0], 2: two[1]}, {}, "of 2 ranks, named 0, 2, number 1 is missing"),
        (four, {}, "mem_parallel_size is 2; it must be 4"),
        (four, {"mem_parallel_size": 4, "tucker_multihead": 3}, "1 or 2, and divide the 4 ranks"),
        (tmp_path, {}, "has no rank_0/model.pt"),
    ]
    for given, changes, message in cases:
        with pytest.raises(UltraMemError, match=message):
            load_official_v2(given, CFG | changes)
    with pytest.raises(UltraMemError, match="has 8 columns, which 3 ranks cannot share"):
        cut_official_v2(state, 3)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_Code(), r"model\.pt asks for \S*mkdir\. Nothing of it was run"),
        ([1, 2], r"model\.pt holds a list, no state dict"),
        (None, r"model\.pt is damaged, or no plain data\. Nothing of it was run"),
    ],
)
def test_files_that_hold_something_else_are_refused(
    content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cut" / "rank_0").mkdir(parents=True)
    file = tmp_path / "cut" / "rank_0" / "model.pt"
    if content is None:
        file.write_bytes(b"no file of torch")
    else:
        torch.save(content, file)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UltraMemError, match=message):
        load_official_v2(tmp_path / "cut", CFG)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cut"]
