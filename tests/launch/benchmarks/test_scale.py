"""What a rank does before its first step grows with neither the world nor the tables."""

import csv

from launch.benchmarks.scale import Case, main, measured
from tests.ranks import run_on_ranks


def _measured(*cases):
    return [measured(case) for case in cases]


def test_nothing_on_a_rank_grows_with_the_world_or_the_whole_table():
    large = ("--ultramem-num-keys", "8192")
    small_world, world, large_table = run_on_ranks(
        1,
        _measured,
        Case(64, 64, "number"),
        Case(1024, 1024, "number"),
        Case(1024, 1024, "number", large),
    )[0]
    assert small_world["shards"] == world["shards"] == large_table["shards"] > 100
    for row in (small_world, world, large_table):
        whole = row["values"] * row["value_dim"]
        assert whole / row["table_ranks"] <= row["rank_table_parameters"] * 1.001
        assert row["rank_table_parameters"] <= 1.001 * whole / row["table_ranks"] + 1e5
    assert world["process_groups"] < 20 * small_world["process_groups"]  # 16 times the ranks
    assert world["rank_parameters"] < small_world["rank_parameters"]
    # Neither the table of 400 million values nor a list of all ranks for each rank.
    assert large_table["peak_process_gb"] - small_world["peak_process_gb"] < 0.3


def _quick(folder):
    main(["--out", str(folder), "--quick"])


def test_the_benchmark_writes_a_row_for_each_case(tmp_path):
    run_on_ranks(1, _quick, tmp_path)
    with (tmp_path / "scale.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["world_size"] for row in rows] == ["64", "512"]
    assert all(row["commit"] and float(row["groups_and_model_s"]) > 0 for row in rows)
