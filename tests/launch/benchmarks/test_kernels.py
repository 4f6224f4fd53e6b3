"""The kernel benchmark: what it compares agrees, and what it writes is complete. Nothing is timed
here for its own sake."""

import csv
from dataclasses import replace

import pytest
import torch

from launch.benchmarks.kernels import lookups, measure, plot, run
from launch.benchmarks.kernels.__main__ import main
from launch.benchmarks.kernels.candidate import check
from launch.benchmarks.kernels.plain_layer import plain_layer
from launch.benchmarks.kernels.ratios import ratios
from launch.benchmarks.kernels.shapes import Shape
from tests.closeness import assert_close, rounding
from tests.layers import HIDDEN, small_layer, sum_lengths
from tests.ranks import run_on_ranks
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.reference import reference_layer

_CPU = torch.device("cpu")
_TINY = Shape(tokens=4, hidden=16, num_keys=8, topk=4, value_dim=8)


@pytest.mark.parametrize("changes", [{}, {"heads": 4, "cores": 3}, {"value_expansion": 1}], ids=str)
def test_the_plain_baseline_computes_the_layer(changes):
    layer = small_layer(**changes)
    x = torch.randn(6, HIDDEN, dtype=torch.float64)
    expected = reference_layer(x.unsqueeze(1), layer.state_dict(), layer.config, eps=1e-5)
    tolerance = rounding(x.dtype, sum_lengths(layer.config))
    assert_close(plain_layer(layer, x), expected.squeeze(1), tolerance)


def test_what_is_wrong_is_not_timed():
    candidates = lookups.candidates(_TINY, _CPU)
    errors = check(candidates, 1e-5)
    assert set(errors) == {c.name for c in candidates}
    wrong = replace(candidates[1], name="wrong", forward=lambda: 1.01 * candidates[1].forward())
    with pytest.raises(UltraMemError, match=r"wrong is off by .* from reference .*: not timed"):
        check([candidates[0], wrong], 1e-5)


def test_bytes_and_flops_of_a_lookup():
    shape = Shape(tokens=2, topk=3, heads=1, value_dim=4, expansion=1, num_keys=10)
    assert shape.lookup_bytes(backward=False) == (2 * 3 * 4 + 2 * 4) * 4
    assert shape.lookup_bytes(backward=True) == 2 * 128 + 2 * 6 * 4 * 4
    assert shape.lookup_flops(backward=False) == 2 * 2 * 3 * 4


def test_memory_that_tables_and_gradients_need():
    shape = Shape(num_keys=10, value_dim=4, hidden=8, dtype=torch.bfloat16)
    # A table and its gradient in bf16; main_grad and a dense gradient in float32.
    assert run._needed_bytes("lookup", shape) == 100 * 4 * (2 * 2 + 2 * 4)
    # Beside them tables of two cores and of the hidden width, each twice ours, and the gradient
    # of one of these in place of ours; and what a table without main_grad keeps.
    assert run._needed_bytes("layer", shape) == 100 * 4 * ((1 + 2 + 2 + 2 + 1) * 2 + 2 * 4)
    assert run._needed_bytes("lookup behind pre-values", shape) == 2 * 100 * 4 * (2 + 1 + 2 * 4)
    assert run._needed_bytes("side top-m", shape) == 0


def test_what_does_not_fit_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(measure, "free_memory", lambda device: 1000)
    assert list(run._measured("lookup", _TINY, _CPU, 1e9)) == []
    assert "left out: needs about" in capsys.readouterr().out


def _quick_run(folder):
    measure._SECONDS = 0  # the least number of repeats
    main(["run", "--out", str(folder), "--quick", "--device", "cpu"])


def test_a_run_writes_tidy_rows_and_plots(tmp_path):
    run_on_ranks(1, _quick_run, tmp_path)
    with (tmp_path / "kernels.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert {row["op"] for row in rows} == set(run._OPS)
    assert {row["passes"] for row in rows} == {"forward", "forward+backward"}
    named = {row["candidate"] for row in rows if row["op"] == "layer"}
    assert {"reference", "torch", "plain", "dense MLP, equal FLOPs"} <= named
    assert any("Megatron MoE" in name for name in named)
    for row in rows:
        assert float(row["ms_min"]) > 0
        assert all(row[c] for c in ("hardware", "torch", "commit", "values", "tokens", "dtype"))
    assert (tmp_path / "latency_over_values.png").stat().st_size > 10_000
    assert (tmp_path / "ratios.png").stat().st_size > 10_000


def test_ratios():
    def row(op, candidate, values, ms, extra=0):
        return {
            "sweep": "values",
            "op": op,
            "candidate": candidate,
            "passes": "forward+backward",
            "values": values,
            "ms_min": ms,
            "backward_extra_bytes": extra,
        }

    found = ratios(
        [
            row("layer", "plain", 128**2, 30),
            row("layer", "native", 128**2, 10),
            row("layer", "plain", 1024**2, 80),
            row("layer", "native", 1024**2, 20),
            row("lookup behind pre-values", "two passes", 1024**2, 8),
            row("lookup behind pre-values", "native", 1024**2, 6),
            row("lookup", "native", 128**2, 2, 10**6),
            row("lookup", "native", 1024**2, 5, 3 * 10**6),
        ]
    )
    assert [value for _, value, _ in found] == [3.0, 4.0, 0.75, 2.5, 2.0]


def test_another_csv_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UltraMemError, match=r"no rows of this kind\..*ultramem bench kernels run"):
        plot.plot(tmp_path / "other.csv")
