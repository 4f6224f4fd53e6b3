"""The benchmark of tables in several formats: its rows and its medians."""

import csv
from argparse import Namespace
from pathlib import Path

import pytest

from launch.benchmarks.table_formats import FORMATS, _medians, main
from tests.launch.served import NEEDS_VLLM, VLLM
from tests.ranks import run_on_ranks

_FEW = ("--scale", "tiny", "--rounds", "1", "--batches", "2", "--prompt", "8", "--tokens", "4")


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "table_formats.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_a_row_for_each_format(tmp_path: Path) -> None:
    run_on_ranks(1, main, ["--out", str(tmp_path), *_FEW], timeout=300)
    rows = _rows(tmp_path)
    assert tuple(row["tables"] for row in rows) == FORMATS
    assert all(float(row["step_ms"]) > 0 and row["commit"] and row["hardware"] for row in rows)
    whole, half, *codes = (float(row["table_mb"]) for row in rows)
    assert half == whole / 2
    assert all(each == pytest.approx(whole * (16 + 4) / (4 * 16), abs=0.01) for each in codes)


def test_a_step_is_what_all_tokens_but_the_first_take() -> None:
    options = Namespace(prompt=8, tokens=11)
    found = _medians([(0.1, 1.1), (0.2, 2.2), (0.3, 3.3)], 4, options)
    assert found["prompt_tokens_per_second"] == 160  # 4 x 8 in 0.2 s
    assert [found[f"step_ms{of}"] for of in ("", "_least", "_most")] == [200, 100, 300]


class TestWithVLLM:
    """One round of one batch."""

    pytestmark = NEEDS_VLLM

    def test_a_row_for_each_format(self, tmp_path: Path) -> None:
        wide = (*_FEW, "--scale", "small")  # vLLM's attention on CPUs knows heads from 32
        given = ["--out", str(tmp_path), "--vllm", str(VLLM), *wide]
        run_on_ranks(1, main, given, timeout=900)
        rows = _rows(tmp_path)
        engines = [row["engine"] for row in rows]
        assert engines == ["transformers"] * len(FORMATS) + ["vllm"] * len(FORMATS)
        assert [bool(row["vllm"]) for row in rows] == [engine == "vllm" for engine in engines]
