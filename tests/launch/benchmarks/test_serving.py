"""The serving benchmark: its models, its table, its refusals, which the one of formats shares."""

import csv
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.benchmarks import table_formats
from launch.benchmarks.serving import MODELS, main, table
from launch.benchmarks.training_models import SCALES
from tests.launch.served import NEEDS_VLLM, VLLM
from tests.ranks import run_on_ranks
from ultramem_megatron.errors import UltraMemError


def _exported(folder: Path) -> None:
    from launch.benchmarks.serving import export

    scale = SCALES["tiny"]
    for model in MODELS:
        export([*scale.common, *scale.models[model]], folder / model)


def test_both_models_are_exported(tmp_path: Path) -> None:
    run_on_ranks(1, _exported, tmp_path)
    for model in MODELS:
        config = json.loads((tmp_path / model / "config.json").read_text())
        assert (config["memory"] is not None) == (model == "ultramem")
        assert (tmp_path / model / "model.safetensors").exists()


def test_times_are_medians_of_rounds_and_repeats() -> None:
    options = Namespace(scale="small", batches=[4], prompt=8, tokens=11)
    rounds = [{"seconds": {"4": [(0.1, 1.1), (0.2, 2.2)]}}, {"seconds": {"4": [(0.3, 3.3)]}}]
    dense, ultramem = table({"dense": rounds, "ultramem": rounds[:1]}, options)
    assert (dense["first_token_ms"], dense["step_ms"], dense["runs"]) == (200, 200, 3)
    assert (dense["step_ms_least"], dense["step_ms_most"]) == (100, 300)
    assert dense["tokens_per_second"] == 20  # 4 x 11 in 2.2 s
    assert (ultramem["model"], ultramem["runs"]) == ("ultramem", 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "1"], "--tokens is 1; it must be at least 2"),
        (["--batches", "4", "0"], "--batches is 0; it must be at least 1"),
        (["--vllm", "nowhere/python"], "nowhere/python is not there. Run bash launch/serving"),
    ],
)
@pytest.mark.parametrize("benchmark", [main, table_formats.main])
def test_wrong_flags_are_refused(
    tmp_path: Path, benchmark: Callable[[list[str]], None], flags: list[str], message: str
) -> None:
    with pytest.raises(UltraMemError, match=message):
        benchmark(["--out", str(tmp_path), *flags])


class TestWithVLLM:
    """One round of one batch."""

    pytestmark = NEEDS_VLLM

    def test_a_row_for_each_model(self, tmp_path: Path) -> None:
        few = ["--batches", "2", "--tokens", "4", "--repeats", "1", "--rounds", "1"]
        run_on_ranks(1, main, ["--out", str(tmp_path), "--vllm", str(VLLM), *few], timeout=900)
        with (tmp_path / "serving.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["model"] for row in rows] == ["dense", "ultramem"]
        assert all(float(row["step_ms"]) > 0 and row["vllm"] for row in rows)
