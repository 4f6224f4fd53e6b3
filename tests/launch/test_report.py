"""Reading losses back and presenting them."""

import json
import math
import struct
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from launch import report


def write_events(folder: Path, scalars: dict[str, list[tuple[int, float]]], start: float) -> None:
    with SummaryWriter(str(folder)) as writer:
        for tag, points in scalars.items():
            for step, value in points:
                writer.add_scalar(tag, value, step, walltime=start + step)


def test_later_value_of_a_step_stands(tmp_path: Path) -> None:
    both = {"lm loss validation": [(2, 3.5)], "lm loss": [(1, 4.0), (2, 3.0), (3, 2.9)]}
    write_events(tmp_path, both, start=1000.0)
    write_events(tmp_path, {"lm loss": [(3, 2.5), (4, 2.0)]}, start=2000.0)
    curves = report.read_curves(tmp_path)
    assert [(p.step, p.value) for p in curves.train] == [(1, 4.0), (2, 3.0), (3, 2.5), (4, 2.0)]
    assert [(p.step, p.value) for p in curves.valid] == [(2, 3.5)]
    assert curves.train[-1].time == 2004.0


def test_missing_losses_are_named(tmp_path: Path) -> None:
    write_events(tmp_path, {"lm loss": [(1, 1.0)]}, start=0.0)
    with pytest.raises(ValueError, match="lm loss validation"):
        report.read_curves(tmp_path)


def test_speed_is_the_median_of_uninterrupted_steps() -> None:
    times = {1: 0.0, 2: 2.0, 3: 4.0, 4: 9.0, 5: 100.0, 6: 104.0, 8: 105.0}
    curve = [report.Point(step, time, 0.0) for step, time in times.items()]
    # Steps took 2, 2, 5, (restart), 4 seconds; step 7 is missing.
    assert report.tokens_per_second(curve, 300, resumed_at=4) == pytest.approx(300 / 3.0)
    with pytest.raises(ValueError, match="two consecutive steps"):
        report.tokens_per_second(curve[3:5], 300, resumed_at=4)


def test_newest_checkpoint_is_found_by_megatrons_tracker(tmp_path: Path) -> None:
    assert report.latest_checkpoint(tmp_path) is None
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    assert report.latest_checkpoint(tmp_path) == (12, tmp_path / "iter_0000012")


def test_plot_is_a_picture_of_its_size(tmp_path: Path) -> None:
    train = [report.Point(step, 0.0, 8 * math.exp(-step / 9)) for step in range(1, 30)]
    file = tmp_path / "loss.png"
    report.plot(report.Curves(train, train[::5]), 6.5, 20, file)
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (960, 600)


def test_the_running_mean_is_of_the_steps_so_far() -> None:
    steps, means = report._running_mean([(step, float(step)) for step in range(1, 31)])
    assert steps == list(range(1, 31))
    assert (means[0], means[1], means[-1]) == (1.0, 1.5, 25.5)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    report.write_json({"text": "é"}, file)
    with pytest.raises(TypeError):
        report.write_json({"bad": object()}, file)
    assert json.loads(file.read_text(encoding="utf-8")) == {"text": "é"}
