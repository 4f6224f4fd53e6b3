"""The benchmark of preparing text: a row a program, or one line for what is not there."""

import csv

import pytest

from launch.benchmarks.data import main
from ultramem_megatron.errors import UltraMemError


def test_a_checkout_that_is_none_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_LM_PATH", str(tmp_path))
    with pytest.raises(UltraMemError, match="Give a checkout of Megatron-LM"):
        main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_row_with_its_speed_and_nothing_left(tmp_path, monkeypatch):
    monkeypatch.delenv("MEGATRON_LM_PATH", raising=False)
    main(["--out", str(tmp_path), "--quick"])
    with (tmp_path / "data.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["program"] == "ultramem data prepare"
    assert 1e6 <= int(row["text_bytes"]) < 1.1e6
    assert float(row["seconds"]) > 0
    assert int(row["largest_process_bytes"]) > 1e7
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"]
