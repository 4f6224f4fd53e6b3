"""New definitions for a trained model: what is compared at equal learning; a run of two steps."""

import csv

import pytest
import torch
from torch import nn

from launch.ablations.recall import write_dictionary
from launch.ablations.tuning.__main__ import main
from launch.ablations.tuning.definitions import Definitions, known, new_lines
from launch.ablations.tuning.low_rank import LowRank
from launch.ablations.tuning.results import LEARNT, at_equal_learning, best_rate, summary
from tests.launch.test_ablations import TINY, fetched


def _line(method, rate, seed, step, new, old):
    numbers = {"new_recall": 0, "old_recall": old / 10, "heldout_loss": 7.0}
    where = {"method": method, "rate": rate, "seed": seed, "step": step}
    return {k: str(v) for k, v in {**where, "new_loss": new, "old_loss": old, **numbers}.items()}


def _lines():
    found = []
    for seed in (1, 2):
        for method, rate, old in (("a", 0.1, 2.0), ("a", 0.2, 1.0), ("b", 5.0, 1.5)):
            found.append(_line(method, rate, seed, 0, LEARNT + 2, 1.0))
            found.append(_line(method, rate, seed, 10, LEARNT - 2, old))
    return [*found, _line("b", 9.0, 1, 0, LEARNT + 2, 1.0), _line("b", 9.0, 1, 10, LEARNT + 1, 1.0)]


def test_methods_are_compared_where_they_have_learnt_as_much():
    lines = _lines()
    rate, points = best_rate(lines, "a")
    assert (rate, [point["old_loss"] for point in points]) == (0.2, [1.0, 1.0])
    rate, points = best_rate(lines, "b")  # the rate that never gets there is none to compare
    assert (rate, [point["old_loss"] for point in points]) == (5.0, [1.25, 1.25])
    assert [point["step"] for point in points] == [5.0, 5.0]
    assert best_rate(lines[-2:], "b") is None
    table = summary(lines).splitlines()
    assert table[2].startswith("| before |  | 0 | 1.000 ± 0.000 | 10.0 ± 0.0 |")
    assert table[4] == "| b | 5 | 5 | 1.250 ± 0.000 | 12.5 ± 0.0 | 7.000 ± 0.000 |"


def test_a_course_that_stays_above_is_not_compared():
    course = [{"new_loss": LEARNT + 1.0, "step": 0.0}, {"new_loss": LEARNT + 0.1, "step": 5.0}]
    assert at_equal_learning(course) is None
    assert at_equal_learning([*course, {"new_loss": LEARNT, "step": 9.0}])["step"] == 9.0


def test_new_definitions_are_none_of_the_old(tmp_path):
    file = tmp_path / "definitions.tsv"
    file.write_text("".join(f"word{i % 2900}\tof {i}\n" for i in range(3000)))
    write_dictionary(file, tmp_path)
    old = {
        line.partition(": ")[0] for line in (tmp_path / "dictionary.txt").read_text().split("\n")
    }
    lines = new_lines(file, 48)
    assert len(lines) == 48
    assert not old & {line.partition(": ")[0] for line in lines}


def test_what_is_known_of_definitions():
    def next_number(tokens, *_):
        return 100 * torch.nn.functional.one_hot(tokens + 1, 50).float()

    class Model(nn.Module):
        forward = staticmethod(next_number)

    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 10], [3, 9, 10, 0]])
    asked = torch.tensor([[False, True, True], [False, True, True], [False, True, False]])
    found = known(Model(), Definitions(tokens, asked, asked))
    assert found.recall == pytest.approx(2 / 3)
    assert found.loss == pytest.approx(100 / 5)


def test_a_low_rank_change_begins_as_none_and_has_its_rank():
    weight = torch.randn(12, 9)
    change = LowRank(weight, 3)
    assert torch.equal(change(weight), weight)
    nn.init.normal_(change.up)
    assert torch.linalg.matrix_rank(change(weight) - weight) == 3


@pytest.mark.long
def test_a_model_is_taught_in_every_way(tmp_path, capsys):
    output = fetched(tmp_path / "work", 1100)
    words = ["--seeds", "1", "--steps", "2", "--tuning-steps", "2", "--output", str(output)]
    assert main([*words, "--results", str(tmp_path), "--", *TINY]) == 0
    with (tmp_path / "tuning.csv").open(newline="") as opened:
        lines = list(csv.DictReader(opened))
    assert [line["step"] for line in lines] == ["0", "2"] * len(lines[::2])
    assert len({line["method"] for line in lines}) == 5
    start, losses = lines[0]["old_loss"], {line["old_loss"] for line in lines[1::2]}
    assert {line["old_loss"] for line in lines[::2]} == {start}
    assert len(losses - {start}) == len(lines[::2])
    assert (tmp_path / "tuning.png").stat().st_size > 10_000
    assert "| before |" in capsys.readouterr().out
