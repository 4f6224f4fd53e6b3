"""The matrix of flags says what happens today."""

import csv

import pytest

from launch.benchmarks import recipes
from launch.benchmarks.recipes import FIELDS, Outcome, judge, read_cases, try_case
from tests import ROOT
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools import rows

_CASES = {case.name: case for case in read_cases()}
_MATRIX = ROOT / "tests" / "recipes" / "matrix.csv"


def _rows():
    with open(_MATRIX, newline="") as file:
        return list(csv.DictReader(file))


def _outcome(row):
    return Outcome(row["with memories"], row["without"])


def test_the_matrix_has_every_case_and_none_fails():
    found = _rows()
    assert tuple(found[0]) == FIELDS
    assert [tuple(row[field] for field in FIELDS[:4]) for row in found] == [*_CASES.values()]
    assert {row["outcome"] for row in found} <= {"works", "refused", "upstream"}


def test_its_losses_are_those_of_the_cases_that_they_must_equal():
    found = {row["name"]: row for row in _rows()}
    compared = [row for row in found.values() if row["equal to"]]
    assert len(compared) > 50
    for row in compared:
        assert judge(_outcome(row), _outcome(found[row["equal to"]])) == row["outcome"]


_LOSSES, _OTHERS, _FAILS = "losses: 6.25 6.19", "losses: 6.25 6.20", "fails: KeyError"


@pytest.mark.parametrize(
    ("found", "expected", "verdict"),
    [
        ((_LOSSES, _OTHERS), None, "works"),
        ((_LOSSES, _LOSSES), (_LOSSES, _LOSSES), "works"),
        ((_OTHERS, _LOSSES), (_LOSSES, _LOSSES), "DIFFERS"),
        (("losses: 6.25", _LOSSES), (_LOSSES, _LOSSES), "DIFFERS"),
        ((_OTHERS, _OTHERS), (_LOSSES, _LOSSES), "works"),  # Megatron's own differ as well
        ((_OTHERS, "refused: no"), (_LOSSES, "refused: no"), "DIFFERS"),
        ((_OTHERS, "refused: no"), (_LOSSES, _LOSSES), "DIFFERS"),
        ((_FAILS, _LOSSES), None, "FAILS"),
        ((_FAILS, "refused: no"), None, "FAILS"),
        ((_FAILS, _FAILS), None, "upstream"),
        (("refused: --no", _LOSSES), (_LOSSES, _LOSSES), "refused"),
    ],
)
def test_a_verdict_is_of_memories_alone(found, expected, verdict):
    assert judge(Outcome(*found), expected and Outcome(*expected)) == verdict


def test_cases_tried_by_name_leave_the_others_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(recipes, "try_case", lambda _: Outcome("refused: new", _LOSSES))
    there = ["plain", "data parallel", "tensor parallel"]
    before = [row for row in _rows() if row["name"] in there]
    file = tmp_path / "matrix.csv"
    rows.write(file, before)
    recipes.main(["--out", str(file), "--only", "^(data parallel|sequence parallel)$"])
    after = rows.read(file, "")
    assert [row["name"] for row in after] == [*there, "sequence parallel"]
    assert [after[0], after[2]] == [before[0], before[2]]
    assert {after[1]["with memories"], after[3]["with memories"]} == {"refused: new"}
    file.write_text("other\n1\n")
    with pytest.raises(UltraMemError, match="holds no rows of this kind"):
        recipes.main(["--out", str(file), "--only", "^plain$"])
    assert file.read_text() == "other\n1\n"


@pytest.mark.long
@pytest.mark.parametrize("row", _rows()[::4], ids=lambda row: row["name"])
def test_a_quarter_of_it_is_as_it_was(row):
    found, before = try_case(_CASES[row["name"]]).memories, row["with memories"]
    if not before.startswith("losses"):
        assert found == before
        return
    losses, expected = ([float(loss) for loss in each.split()[1:]] for each in (found, before))
    assert losses == pytest.approx(expected, abs=1e-3)  # another machine rounds otherwise
