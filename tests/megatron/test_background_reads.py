"""The file of background reads: what is written is read, and what does not fit is refused."""

import numpy as np
import pytest
import torch

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron import background_reads
from ultramem_megatron.megatron.background_reads import BackgroundReads, TableReads, read_background
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import Span

_DESIGN = UltraMemConfig(spans=(Span(1, 2), Span(3, 4)), num_keys=3, key_dim=4, value_dim=4, topk=2)
_READS = torch.tensor([0, 5, 1, 2, 2, 0, 7, 1, 1])


def _arrays(**changes):
    counts = {
        f"{number}.{kind}": counted.numpy()
        for number in (1, 3)
        for kind, counted in (("reads", _READS), ("batches", _READS.clamp(max=4)))
    }
    return {"batches": np.array(4), **counts, **changes}


def test_what_is_written_is_read(tmp_path):
    keys = {1: 2**32 - 1, 3: None}
    tables = {n: TableReads(_READS + n, _READS.clamp(max=4), keys[n]) for n in (1, 3)}
    BackgroundReads(4, tables).write(tmp_path / "reads.npz")
    found = read_background(str(tmp_path / "reads.npz"), _DESIGN)
    assert found.batches == 4
    assert found.tables.keys() == tables.keys()
    for number, table in tables.items():
        assert torch.equal(found.tables[number].reads, table.reads)
        assert torch.equal(found.tables[number].batches, table.batches)
        assert found.tables[number].keys == keys[number]
    assert [file.name for file in tmp_path.iterdir()] == ["reads.npz"]
    with pytest.raises(UltraMemError, match=r"No such file or directory\. Give a file in"):
        BackgroundReads(4, tables).write(tmp_path / "nowhere" / "reads.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"5.reads": _READS.numpy()}, "does not count 9 rows of each table .* layers 1, 3"),
        ({"1.reads": np.arange(8)}, "does not count 9 rows"),
        ({"1.reads": np.arange(9.0)}, "does not count 9 rows"),
        ({"1.reads": np.arange(9).reshape(3, 3)}, "does not count 9 rows"),
        ({"1.keys": np.arange(9)}, "does not count 9 rows"),
        ({"batches": np.arange(2)}, "does not count 9 rows"),
        ({"batches": np.array([4] * 1000)}, "does not count 9 rows"),
        ({"1.reads": np.arange(9, dtype=object)}, "does not count 9 rows|damaged"),
        ({"batches": np.array(3)}, "more batches than there are"),
        ({"3.batches": _READS.numpy() + 1}, "less often than in batches"),
        ({"3.batches": np.full(9, -1)}, "more batches than there are"),
    ],
)
def test_other_tables_and_impossible_counts_are_refused(changes, message, tmp_path):
    file = tmp_path / "reads.npz"
    np.savez(file, **_arrays())
    read_background(str(file), _DESIGN)
    np.savez(file, **_arrays(**changes))
    with pytest.raises(UltraMemError, match=message):
        read_background(str(file), _DESIGN)


def test_files_that_are_none_are_refused(tmp_path):
    file = tmp_path / "reads.npz"
    with pytest.raises(UltraMemError, match=r"reads.npz: No such file or directory"):
        read_background(str(file), _DESIGN)
    np.savez(file, **_arrays())
    whole = file.read_bytes()
    for damaged in (b"", b"text", whole[:-40], whole.replace(b"NUMPY", b"NUMBY")):
        file.write_bytes(damaged)
        with pytest.raises(UltraMemError, match="it is damaged, or no such file"):
            read_background(str(file), _DESIGN)


def test_sizes_are_compared_before_anything_is_unpacked(tmp_path, monkeypatch):
    file = tmp_path / "reads.npz"
    np.savez(file, **_arrays(**{"1.reads": np.zeros(10**6, np.int64)}))
    monkeypatch.setattr(background_reads, "_unpacked", None)
    with pytest.raises(UltraMemError, match="does not count 9 rows"):
        read_background(str(file), _DESIGN)
