"""The benchmark of AdamW on rows: both ways come to the same bits, or it fails."""

import csv

import pytest
import torch

from launch.benchmarks import optimizer
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.adam_rows import AdamRows


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_row_for_each_share(tmp_path):
    optimizer.main(["--out", str(tmp_path), "--quick"])
    with (tmp_path / "optimizer.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["share_touched"]) for row in rows] == [0.1, 1.0]
    for row in rows:
        assert 0 < float(row["read_ms"]) <= float(row["rows_ms"])
        assert float(row["lowest"]) <= float(row["dense_over_rows"]) <= float(row["highest"])


def test_rows_that_were_forgotten_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(AdamRows, "catch_up", lambda *_: None)
    with pytest.raises(UltraMemError, match="differ after 45 steps of 1024 values"):
        optimizer.main(["--out", str(tmp_path), "--quick"])
