"""The report for GPU machines: parts that fail, end or hang are rows; without a GPU it runs too."""

import importlib
import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from torch.torch_version import TorchVersion

from launch.benchmarks.trace import Interval
from launch.gpu_report import __main__ as report
from launch.gpu_report.__main__ import main, run_parts
from launch.gpu_report.known import KNOWN
from launch.gpu_report.page import page, targets
from launch.gpu_report.parts import authors, benchmarks, decode, overlap, parity, speed
from launch.gpu_report.parts.overlap import beside
from launch.gpu_report.row import Row, attempted
from tests import ROOT
from tests.inference.test_decode_launches import BETWEEN, PRODUCTS
from tests.launch.launches import launches_of_a_layer
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce_reference
from ultramem_megatron.kernels.quantized import FORMATS
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.tools.gpu_report import AUTHORS, PARTS, SOURCES


def test_a_failure_is_a_row_and_what_came_before_stays():
    def measure():
        yield Row(what="one", value=1.0)
        raise ValueError("no\nsuch kernel")

    first, second = attempted("two", measure)
    assert first.value == 1.0
    assert second.what == "two"
    assert second.error.startswith("ValueError: no such kernel (")


def test_parts_that_end_badly_end_nothing_else(tmp_path, monkeypatch):
    folder = tmp_path / "parts_for_a_test"
    folder.mkdir()
    row = "from launch.gpu_report.row import Row\n"
    for name, body in {
        "dies": "    import os\n    yield Row(what='before', value=2)\n    os._exit(7)\n",
        "hangs": "    import time\n    yield Row(what='begun', value=3)\n    time.sleep(60)\n",
        "fails": "    yield Row(what='half', value=4)\n    raise KeyError('x')\n",
    }.items():
        (folder / f"{name}.py").write_text(f"{row}def rows(large):\n{body}")
    monkeypatch.chdir(tmp_path)  # where python -m looks first
    parts = {f"parts_for_a_test.{name}": 0.08 for name in ("dies", "hangs", "fails")}
    begun = time.monotonic()
    run_parts(tmp_path / "out", parts, minutes=1, large=False)
    assert time.monotonic() - begun < 55
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(row["what"], row["value"]) for row in report["dies"]] == [
        ("before", 2),
        ("dies", None),
    ]
    assert report["dies"][1]["error"] == "ended with status 7"
    assert report["hangs"][-1]["error"] == "stopped after 5 s"
    assert report["fails"][1]["error"].startswith("KeyError: 'x'")
    assert "3 of 6 rows failed" in (tmp_path / "out" / "report.md").read_text()


def test_ended_from_outside_it_keeps_what_there_is_and_leaves_nothing_running(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, time\nfrom launch.gpu_report.row import Row\n"
        "def rows(large):\n    yield Row(what='begun', value=os.getpid())\n    time.sleep(60)\n"
    )
    program = (
        "import sys; from pathlib import Path; from launch.gpu_report.__main__ import run_parts; "
        "run_parts(Path(sys.argv[1]), {'slow': 1, 'never': 1}, minutes=1, large=False)"
    )
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))
    report = tmp_path / "report.json"
    running = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=tmp_path,
    )
    until = time.monotonic() + 50
    while not report.exists() or not json.loads(report.read_text())["slow"]:
        assert time.monotonic() < until
        time.sleep(0.1)
    running.terminate()
    assert running.wait(20) == 130
    first, second = json.loads(report.read_text())["slow"]
    assert (first["what"], second["error"]) == ("begun", "ended from outside")
    with pytest.raises(ProcessLookupError):
        os.kill(first["value"], 0)


def test_what_the_time_does_not_suffice_for_is_named(tmp_path):
    run_parts(tmp_path, {"launch.gpu_report.parts.environment": 1}, minutes=0.001, large=False)
    assert "not begun: --minutes 0.001 are over" in (tmp_path / "report.md").read_text()


def test_the_first_parts_run_without_a_gpu(tmp_path, capfd):
    main(["--out", str(tmp_path), "--only", "environment,parity"])
    assert "There is no NVIDIA GPU here" in capfd.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    failed = [row for rows in report.values() for row in rows if row["error"]]
    assert not failed
    assert {row["what"] for row in report["environment"]} > {"hardware", "commit"}
    assert all(float(row["value"]) < 3e-2 for row in report["parity"] if row["unit"])
    assert all(row["value"] == "equal" for row in report["parity"] if not row["unit"])


@pytest.mark.long
def test_all_parts_run_without_a_gpu(tmp_path):
    main(["--out", str(tmp_path), "--minutes", "20"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == list(PARTS)
    assert all(rows and not any(row["error"] for row in rows) for rows in report.values()), report
    assert report["trainings"][-1]["value"] == 0


def test_without_the_authors_sources_a_row_says_how_to_give_them(monkeypatch):
    monkeypatch.delenv(AUTHORS, raising=False)
    (row,) = authors.rows(large=False)
    assert "give --authors PATH" in row.value
    assert not row.error


def _sources(folder):
    for name in SOURCES:
        (folder / name).write_text("#error not for this compiler\n")
    return folder


def test_a_failing_build_of_the_authors_sources_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setenv(AUTHORS, "")  # and what main sets is undone
    monkeypatch.setattr(report, "run_parts", lambda *given: None)
    main(["--out", str(tmp_path / "out"), "--authors", str(_sources(tmp_path))])
    (row,) = authors.rows(large=False)
    assert row.what == "the authors' lookup"
    assert row.error.startswith("UltraMemError: not built: ")


class _Theirs:
    """In the place of their extension: its arguments, in PyTorch."""

    def __init__(self, factor):
        self.factor = factor

    def forward(self, addresses, table, scores, size, own, shift, groups, padding, padded):
        assert (addresses.dtype, scores.dtype, own) == (torch.int32, torch.bfloat16, len(table))
        assert (size, shift, padded) == (own, 0, False)
        out = self._lookup(addresses, table, scores, groups)
        return self.factor * out.flatten(1)

    def backward(self, addresses, table, scores, grad, main_grad, size, own, shift, groups, *more):
        leaves = table.float().requires_grad_(), scores.clone().requires_grad_()
        out = self._lookup(addresses, *leaves, groups)
        of_table, of_scores = torch.autograd.grad(out, leaves, grad.view(out.shape).float())
        main_grad += of_table
        return of_scores

    def _lookup(self, addresses, table, scores, groups):
        rows, group = addresses.long() % len(table), addresses.long() // len(table)
        return lookup_reduce_reference(table, rows, group, scores.permute(1, 2, 0), groups)


@pytest.mark.parametrize("factor", [1, 1.1])
def test_the_authors_lookup_is_timed_where_it_agrees(factor, monkeypatch, tmp_path):
    monkeypatch.setenv(AUTHORS, str(_sources(tmp_path)))
    monkeypatch.setattr(authors.cpp_extension, "load", lambda **given: _Theirs(factor))
    rows = list(authors.rows(large=False))
    assert rows[0].unit == "s"
    if factor != 1:
        assert [row.value for row in rows[1:]] == [None, None]
        assert all("they differ by 1.0e-01" in row.error for row in rows[1:])
        return
    assert not [row.error for row in rows if row.error]
    timed = {row.what for row in rows if row.unit == "us"}
    assert timed == {
        f"{whose} {passes}, {shape} shape, T 16"
        for whose in ("lookup", "the authors' lookup")
        for passes in ("forward", "backward")
        for shape in ("1.6B", "227M")
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "parity,x"], r"--only parity,x: there is no x\. Parts: environment, parity"),
        (
            ["--authors", "x"],
            r"--authors x: there is no fused_lookup\.cpp\. Give the folder fuse_ops",
        ),
        (["--minutes", "0"], r"--minutes 0: must be more than 0"),
        (["--minutes", "nan"], r"--minutes nan: must be more than 0"),
    ],
)
def test_wrong_flags_are_refused(words, message, tmp_path):
    with pytest.raises(UltraMemError, match=message):
        main(["--out", str(tmp_path), *words])


def test_an_older_torch_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.10.0+cu128"))
    with pytest.raises(UltraMemError, match=r"torch 2\.10\.0\+cu128 .* wants 2\.11 or newer"):
        main(["--out", str(tmp_path)])


def test_what_ran_beside_something_is_counted_once():
    ours = [Interval("branch", 0, 10), Interval("branch", 20, 30)]
    others = [Interval("a", 5, 8), Interval("b", 6, 22), Interval("c", 29, 40)]
    assert beside(ours, others) == 5 + 2 + 1
    assert beside(ours, []) == 0


def test_what_is_known_is_asked_of_some_part():
    """Names of rows: a row that was renamed would lose its target."""
    from launch.benchmarks.decode import QUICK
    from launch.gpu_report.parts import eight_bits, kernels, layer

    asked = {
        f"{op} {passes}, {words}, T {tokens}"
        for op, _, words, _ in kernels._CASES
        for passes in ("forward", "forward and backward")
        for tokens in kernels._TOKENS
    }
    asked |= {
        f"{what}, {words}, T 8192"
        for words, _, _ in layer._CASES
        for what in ("layer forward and backward", "launches", "host waits")
    }
    asked |= {what.format(f", batch {batch}") for what in decode._PAIRS for batch in QUICK}
    asked |= {f"decode, six memories, batch {batch}" for batch in QUICK}
    asked |= {
        f"paged attention, decoding, batch {size.batch}, {size.context} keys"
        for size in kernels._DECODING
    }
    asked |= {f"lookup of {kind} codes, T {max(eight_bits._TOKENS)}" for kind in FORMATS}
    asked |= {
        f"{whose} {passes}, {words}, T {tokens}"
        for whose in ("lookup", "the authors' lookup")
        for passes in ("forward", "backward")
        for words, _ in authors._SHAPES
        for tokens in authors._TOKENS
    }
    starts = (
        "the authors'",
        "decode, ",
        "paged",
        "lookup",
        "side top-m",
        "grid top-m",
        "layer",
        "launches, ",
        "host waits",
    )
    assert {name for name in KNOWN if name.startswith(starts)} <= asked


@pytest.mark.parametrize("wrong", [0.9, math.nan])
def test_results_that_are_wrong_are_errors(wrong):
    right = {"output": torch.ones(4), "keys": torch.ones(4)}
    found = {"output": torch.ones(4), "keys": torch.full((4,), 1 + wrong)}
    assert parity._worst("layer, float32", right, right).value == 0
    for what in ("layer, float32", "layer, bfloat16"):
        row = parity._worst(what, found, right)
        assert row.error.startswith(f"keys is off by {wrong:.1e}, relative")
    near = {"output": torch.ones(4), "keys": torch.full((4,), 1.1)}
    assert parity._worst("layer, float32", near, right).error
    assert parity._worst("layer, bfloat16", near, right).unit == "relative, of keys"


@pytest.mark.parametrize("shape", parity._shapes(True), ids=parity._words)
def test_a_gpus_shapes_are_those_of_layers(shape):
    with torch.device("meta"):
        layer = UltraMemLayer(shape.config(), hidden_size=shape.hidden, num_layers=12)
    assert len(layer.values.weight) == shape.values


@pytest.mark.parametrize(
    ("part", "benchmark"), [(decode, "decode"), (speed, "training"), (overlap, "overlap")]
)
def test_benchmarks_take_the_flags_that_a_gpu_gives_them(part, benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(overlap, "_beside_layers", lambda large: iter(()))
    asked = []

    def written(name, flags):
        asked.append(name)
        parse = importlib.import_module(f"launch.benchmarks.{name}")._parse
        parse([*flags.split(), "--out", str(tmp_path)])
        return iter(())

    monkeypatch.setattr(part, "written", written)
    assert not [row.error for row in part.rows(large=True)]
    assert asked == [benchmark]


def test_a_benchmark_that_cannot_draw_has_measured():
    assert benchmarks._failure("error: this command needs matplotlib, which is not") == ""
    assert benchmarks._failure("a\nb\nc\nd") == "b / c / d"


def test_the_page_begins_with_all_targets_and_what_they_met():
    asked = "host waits, preset, T 8192"
    row = {"what": asked, "value": 0, "unit": "", "error": ""}
    first, part = page({"layer": [row]}).split("## layer")
    assert "| host waits, preset, T 8192 | 0  | 2 | 0 | 0 |  |" in first
    assert "| launches, preset, T 8192 | not measured  | 186 | 38 | <= 60 |  |" in first
    assert first.count("not measured  |") == 16
    assert part.count(asked) == 1


def test_every_target_stands_beside_a_predicted_figure():
    assert len([known for known in KNOWN.values() if known.target]) == 17
    for what, known in KNOWN.items():
        assert not known.target or None not in (known.h200, known.predicted), what
        assert known.floor is None or known.predicted is None or known.predicted >= known.floor
    assert targets() in (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")


def test_predicted_launches_are_those_counted_and_none_waits_for_the_host():
    counted = launches_of_a_layer(1789, 5)
    step = sum(counted.values())
    assert step == 34, counted
    assert KNOWN["launches, preset, T 8192"].predicted == round(step * 107 / 95)
    of_six = KNOWN["launches of six memories in a decode step"]
    assert of_six.predicted == 6 * sum([*PRODUCTS.values(), *BETWEEN.values(), 1])  # and its sum
