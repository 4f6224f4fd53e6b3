"""`ultramem bench`: the checkout's benchmarks by name, and one line where there is no checkout."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools import bench


def test_every_benchmark_that_can_be_run_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "launch" / "benchmarks"
    runnable = {path.stem for path in folder.glob("*.py") if "Parser(" in path.read_text()}
    runnable |= {path.parent.name for path in folder.glob("*/__main__.py")}
    assert set(bench.BENCHMARKS) == runnable
    bench.main([])
    assert re.findall(r"^  (\w+) ", capsys.readouterr().out, re.M) == list(bench.BENCHMARKS)


def test_a_benchmark_runs_from_any_folder_with_its_own_flags(tmp_path: Path) -> None:
    code = "import sys; from ultramem_megatron.__main__ import main; sys.exit(main())"
    words = ["bench", "overlap", "--out", str(tmp_path), "--ranks", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "error: --ranks 1: one rank exchanges nothing." in done.stderr


def test_without_a_checkout_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_CHECKOUT", tmp_path)
    with pytest.raises(UltraMemError, match=r"not in the wheel.*launch/setup.sh") as refused:
        bench.main(["decode", "--out", "here"])
    assert "\n" not in str(refused.value)
