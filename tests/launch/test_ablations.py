"""Experiments at two steps a run: plumbing, resuming, failures, tables; recall's counting."""

import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from launch import plots
from launch.ablations import recall
from launch.ablations.__main__ import main
from launch.ablations.experiments import EXPERIMENTS, ULTRAMEM_ROW
from launch.ablations.models import sizes
from launch.ablations.results import Results, interval, summary
from ultramem_megatron.data import corpora
from ultramem_megatron.data.own_folder import sizes as file_sizes
from ultramem_megatron.presets import PRESETS

TINY = ["--seq-length", "32", "--eval-iters", "1"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder whose corpora were fetched already."""
    return fetched(tmp_path_factory.mktemp("ablations"), 400)


def fetched(folder: Path, number: int) -> Path:
    """The folder, with corpora of so many definitions."""
    text = folder / "corpora" / "text"
    text.mkdir(parents=True)
    words = [f"word{place}" for place in range(number)]
    (text / "a.txt").write_text("".join(f"{w}: the {w[::-1]} of all things\n" for w in words))
    pairs = "".join(f"{word}\tthe {word[::-1]} of all things\n" for word in words)
    (folder / "corpora" / "definitions.tsv").write_text(pairs)
    manifest = {
        "format": corpora.FORMAT,
        "any_edition": False,
        "sizes": file_sizes(folder / "corpora"),
    }
    (folder / "corpora" / corpora.MANIFEST).write_text(json.dumps(manifest))
    return folder


def run(output: Path, results: Path, experiment: str, *flags: str, seeds: str = "1") -> int:
    words = [experiment, "--seeds", *seeds.split(), "--steps", "2"]
    words += ["--output", str(output), "--results", str(results)]
    return main([*words, "--", *TINY, *flags])


def lines(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_an_experiment_is_trained_once_and_drawn(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(output, tmp_path, "figure10") == 0
    printed = capsys.readouterr().out
    assert "[5/5]" in printed
    assert "0 min left" in printed
    first = lines(tmp_path / "figure10.csv")
    assert [line["model"] for line in first] == [
        model.name for model in EXPERIMENTS["figure10"].models
    ]
    assert {line["seed"] for line in first} == {"1"}
    losses = [float(line["valid_loss"]) for line in first]
    assert len(set(losses)) == 5
    assert all(2 < loss < 8 for loss in losses)
    metrics = {line["metric"] for line in lines(tmp_path / "figure10_curves.csv")}
    assert metrics == {"valid_loss", "train_loss", "top1_score", "output_std", "query_cosine"}
    assert (tmp_path / "figure10.png").stat().st_size > 10_000

    records = sorted((output / "records").glob("*/result.json"))
    times = [record.stat().st_mtime_ns for record in records]
    records[0].unlink()  # as if that run had been interrupted
    (records[0].parent / "notes.txt").write_text("mine")
    left = {file for file in records[0].parent.rglob("*") if file.is_file()}
    (tmp_path / "figure10.csv").unlink()
    assert run(output, tmp_path, "figure10") == 0
    assert [r.stat().st_mtime_ns for r in records[1:]] == times[1:]
    assert records[0].exists()
    assert all(file.exists() for file in left)
    again = lines(tmp_path / "figure10.csv")
    assert [line["valid_loss"] for line in again] == [line["valid_loss"] for line in first]


def test_a_failed_run_leaves_the_others(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(
            output,
            tmp_path,
            "table3",
            "--ultramem-value-expansion",
            "4",
            "--ultramem-tucker-rank",
            "2",
            "--ultramem-key-dim",
            "9",
        )
        == 1
    )
    error = capsys.readouterr().err
    assert "failed; the last lines of" in error
    assert "--ultramem-key-dim is 9, not divisible by" in error


def test_recall_counts_reproduced_definitions(output: Path, tmp_path: Path) -> None:
    assert run(output, tmp_path, "recall") == 0
    for line in lines(tmp_path / "recall.csv"):
        for column in ("recall", "recall_tokens", "heldout", "heldout_tokens"):
            assert 0 <= float(line[column]) <= 1
    assert not list(output.glob("records/*/*/checkpoints"))


def test_counting_of_likeliest_tokens() -> None:
    def next_number(tokens_BS: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens_BS + 1, 50).float()

    rows = [[5, 6, 7, 8, 9], [5, 6, 7], [5, 9, 10, 3]]
    assert recall.count_batch(next_number, rows, [2, 2, 2]) == ([3, 1, 1], [3, 1, 2])


def test_flops_and_parameters_are_equal() -> None:
    dense, moe, _, ultramem = (
        sizes(model.name, tuple(model.small_arguments()))
        for model in EXPERIMENTS["figure1a"].models
    )
    for other in (dense, moe):
        assert abs(other.flops_per_token / ultramem.flops_per_token - 1) < 0.01
    total = ultramem.dense_params + ultramem.sparse_params
    assert abs((moe.dense_params + moe.sparse_params) / total - 1) < 0.01


def test_the_family_has_equal_flops_and_tables() -> None:
    *_, ultramem = models = EXPERIMENTS["family"].models
    counted = {model.name: sizes(model.name, tuple(model.small_arguments())) for model in models}
    of_ultramem = counted[ultramem.name]
    for name in ("memory+", "peer", "ultramemv2"):
        found = counted[name]
        assert abs(found.flops_per_token / of_ultramem.flops_per_token - 1) < 0.02
        assert abs(found.sparse_params / of_ultramem.sparse_params - 1) < 0.01


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_full_scale_prints_the_papers_models(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--scale", "full", "--", "--bf16"]) == 0
    printed = capsys.readouterr().out.splitlines()
    experiment = EXPERIMENTS[name]
    assert len(printed) == len(experiment.models) * len(experiment.seeds)
    for model in experiment.models:
        assert model.preset in PRESETS
    for line in printed:
        words = shlex.split(line)
        assert words[:5] == ["torchrun", "$LAUNCH", "-m", "ultramem_megatron", "train"]
        assert words[-1] == "--bf16"


def test_small_rows_differ_as_the_papers_do() -> None:
    rows = {model.name: model.small for model in EXPERIMENTS["table2"].models}
    assert rows["pkm"]["ultramem-retrieval"] == "pkm"
    assert rows["tdqkr"]["ultramem-cores"] == 1
    assert rows["mcs"]["ultramem-cores"] == 2
    for before, after in zip(rows.values(), list(rows.values())[1:], strict=False):
        assert before != after
    assert EXPERIMENTS["table2"].models[-1].preset == ULTRAMEM_ROW


def test_unknown_experiments_and_missing_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table9"]) == 2
    assert "'table9' is unknown. Known: figure1a" in capsys.readouterr().err
    assert plots.main(["table2", "--results", str(tmp_path)]) == 2
    assert "Make it with: bash launch/ablate_table2.sh" in capsys.readouterr().err


def test_models_stand_beside_what_the_paper_prints_of_them() -> None:
    found = {name: experiment.paper for name, experiment in EXPERIMENTS.items()}
    assert found["figure1a"] == {
        "151M": {"dense": 2.96, "moe": 2.63, "ultramem": 2.67},
        "1.6B": {"dense": 2.49, "moe": 2.30, "ultramem": 2.24},
    }
    table2, table3 = found["table2"]["151M"], found["table3"]["151M"]
    assert (table2["pkm"], table2["ultramem"]) == (2.828, 2.736)
    assert len(table2) == len(table3) == 12
    changes = {"E=1": 2.789, "E=16": 2.762, "r=1": 2.772, "r=3": 2.7636, "h=1": 2.764, "h=8": 2.770}
    assert changes.items() <= table3.items()
    # Those of other sizes or with other changes stand nowhere.
    assert found["recall"] == found["figure6b"] == found["figure10"] == {}


def _runs(losses: dict[str, tuple[float, ...]]) -> list[dict[str, str]]:
    sizes_ = {"dense_params": "1000000", "sparse_params": "0", "flops_per_token": "2000000"}
    return [
        {"model": model, "seed": str(seed), "valid_loss": str(loss), **sizes_}
        for model, seeds in losses.items()
        for seed, loss in enumerate(seeds, start=1)
    ]


def test_summary_pairs_seeds_and_settles_only_what_they_settle() -> None:
    runs = _runs({"dense": (3.0, 4.0, 5.0), "moe": (2.5, 3.3, 4.4), "ultramem": (3.1, 3.9, 5.0)})
    text = summary(Results(EXPERIMENTS["figure1a"], runs, []))
    assert "| 4.000 ± 1.000 |  |  |  |" in text
    assert "| -0.600 (-0.700 to -0.500) | -0.330 | -0.190 |  |  |  |" in text
    beside_moe = "+0.600 (+0.600 to +0.600) | +0.040 | -0.060 |"
    assert f"| not resolved: -0.100 to +0.100 | -0.290 | -0.250 | {beside_moe}" in text
    two = _runs({"dense": (3.0, 4.0), "moe": (2.5, 3.3)})
    assert "| -0.500 and -0.700 | -0.330 |" in summary(Results(EXPERIMENTS["figure1a"], two, []))


def test_a_row_stands_beside_the_row_before() -> None:
    runs = _runs({"pkm": (3.0, 3.0, 3.0), "no-softmax": (2.9, 2.9, 2.9), "ive": (2.7, 2.7, 2.7)})
    [*_, last] = summary(Results(EXPERIMENTS["table2"], runs, [])).splitlines()
    assert "| -0.300 (-0.300 to -0.300) | -0.056 | -0.200 (-0.200 to -0.200) | -0.050 |" in last


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(size=400).tolist()
    low, high = interval(values)
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert low < np.mean(values) < high
