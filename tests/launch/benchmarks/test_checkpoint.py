"""The benchmark of checkpoints: what it loads is what it saved, or it fails."""

import csv

import pytest

from launch.benchmarks.checkpoint import main
from launch.benchmarks.recipes import main as try_recipes
from tests.ranks import run_on_ranks
from ultramem_megatron.errors import UltraMemError


def _quick(folder):
    main(["--out", str(folder), "--quick"])


@pytest.mark.parametrize(("command", "name"), [(main, "out"), (try_recipes, "out/matrix.csv")])
def test_a_folder_that_cannot_be_made_is_one_line(command, name, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UltraMemError, match="Results go to a folder that is there or can be made"):
        command(["--out", str(tmp_path / "taken" / name)])


@pytest.mark.long
def test_a_row_for_each_size_with_its_bytes(tmp_path):
    run_on_ranks(1, _quick, tmp_path)
    with (tmp_path / "checkpoint.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["bytes"]) for row in rows] == [3 * 2**12 * 64 * 4, 3 * 2**14 * 64 * 4]
    for row in rows:
        assert 1 <= int(row["bytes_on_disk"]) / int(row["bytes"]) < 1.1
        assert 0 < float(row["async_waited_for_s"]) <= float(row["async_in_all_s"])
    assert not list(tmp_path.glob("*/"))
