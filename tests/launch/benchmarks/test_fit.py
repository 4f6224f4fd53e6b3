"""The benchmark beside plan --fit: real steps on ranks of this machine."""

import csv

import pytest

from launch.benchmarks.fit import main
from tests.ranks import run_on_ranks


def _quick(folder):
    main(["--out", str(folder), "--quick"])


@pytest.mark.long
def test_a_row_holds_what_was_predicted_and_what_was_measured(tmp_path):
    run_on_ranks(1, _quick, tmp_path)
    with (tmp_path / "fit.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert row["ranks"] == "1"
    assert 0.1 < float(row["cpu_ms"]) / float(row["predicted_ms"]) < 20
    assert float(row["fastest_ms"]) <= float(row["median_ms"])
