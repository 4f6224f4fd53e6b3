"""The benchmark of a layer beside its limit: what it counts, and a row for each candidate."""

import csv

import pytest

from launch.benchmarks import layer
from launch.benchmarks.kernels import measure
from launch.benchmarks.kernels.shapes import Shape


def test_the_limit_is_products_and_bytes_at_their_rates(monkeypatch):
    shape = Shape(tokens=2, hidden=8, num_keys=16, topk=4, value_dim=4, heads=2, expansion=3)
    monkeypatch.setattr(layer, "_product_rate", lambda shape: 1e6)
    monkeypatch.setattr(layer, "_row_rate", lambda shape: 1e6)
    found = layer.limit(shape)
    projection = 3 * 2 * (3 * 4 * 8) * 2  # passes, FLOPs of a multiply-add, of a token, tokens
    assert found["limit_projection_ms"] == pytest.approx(projection / 1e3)
    assert found["limit_lookup_ms"] == pytest.approx(shape.lookup_bytes(backward=True) / 1e3)
    parts = sum(found[f"limit_{part}_ms"] for part in ("query", "keys", "projection", "lookup"))
    assert found["limit_ms"] == pytest.approx(parts)


def test_products_grids_and_lookup_are_what_a_layer_computes():
    shape = Shape()
    rest = shape.layer_macs() - sum(shape.product_macs().values())
    grids = shape.heads * shape.cores * shape.topk**2 * shape.config().tucker_rank
    assert rest == grids + shape.picks * shape.value_dim


def test_a_row_for_each_candidate(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "_SECONDS", 0)
    monkeypatch.setattr(layer, "_STEPS", 2)
    layer.main(["--out", str(tmp_path), "--quick"])
    with (tmp_path / "layer.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["dtype"] for row in rows] == 3 * ["float32"] + 3 * ["bfloat16"]
    assert {row["candidate"] for row in rows} == {
        "ours",
        "plain",
        "ours, dense gradient of its own",
    }
    for row in rows:
        assert 0 < float(row["ms_min"]) <= float(row["ms_median"])
        assert float(row["error"]) < (0.3 if row["candidate"] == "plain" else 3e-2)
        assert float(row["limit_ms"]) > 0
    assert "over its limit" in capsys.readouterr().out
