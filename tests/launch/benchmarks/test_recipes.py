"""The matrix of flags says what happens today."""

import csv

import pytest

from launch.benchmarks.recipes import FIELDS, read_cases, try_case
from tests import ROOT

_CASES = {case.name: case for case in read_cases()}
_MATRIX = ROOT / "tests" / "recipes" / "matrix.csv"


def _rows():
    with open(_MATRIX, newline="") as file:
        return list(csv.DictReader(file))


def test_the_matrix_has_every_case_and_none_fails():
    rows = _rows()
    assert tuple(rows[0]) == FIELDS
    assert [(row["name"], row["flags"]) for row in rows] == [
        (c.name, c.flags) for c in _CASES.values()
    ]
    assert {row["outcome"] for row in rows} == {"works", "refused"}


@pytest.mark.long
@pytest.mark.parametrize("row", _rows()[::4], ids=lambda row: row["name"])
def test_a_quarter_of_it_is_as_it_was(row):
    found = try_case(_CASES[row["name"]])
    assert found["outcome"] == row["outcome"]
    if row["outcome"] == "refused":
        assert found["with memories"] == row["with memories"]
        return
    losses, expected = (
        [float(loss) for loss in each["with memories"].split()[1:]] for each in (found, row)
    )
    assert losses == pytest.approx(expected, abs=1e-3)  # another machine rounds otherwise
