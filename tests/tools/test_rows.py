"""CSV rows: header, whole files, files that grow, refusals."""

import pytest

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools import rows

_TWO = [{"a": 1, "b": "x,y"}, {"a": 2, "b": ""}]


def _broken():
    yield _TWO[0]
    raise KeyboardInterrupt


def test_rows_come_back_as_text(tmp_path):
    file = tmp_path / "new" / "some.csv"
    rows.write(file, _TWO)
    assert file.read_bytes() == b'a,b\n1,"x,y"\n2,\n'
    assert rows.read(file, "this", ["b"]) == [{"a": "1", "b": "x,y"}, {"a": "2", "b": ""}]


def test_who_is_interrupted_leaves_what_was_there(tmp_path):
    file = tmp_path / "some.csv"
    rows.write(file, _TWO)
    with pytest.raises(KeyboardInterrupt):
        rows.write(file, _broken())
    assert len(rows.read(file, "this")) == 2


def test_rows_of_a_long_measurement_stay(tmp_path):
    file = tmp_path / "some.csv"
    with pytest.raises(KeyboardInterrupt):
        rows.write_as_made(file, _broken())
    assert file.read_text() == 'a,b\n1,"x,y"\n'
    assert rows.write_as_made(file, iter(_TWO)) == _TWO


def test_each_row_is_on_the_disk_before_the_next_is_made(tmp_path):
    file = tmp_path / "some.csv"

    def made():
        yield _TWO[0]
        assert file.read_text() == 'a,b\n1,"x,y"\n'
        yield _TWO[1]

    rows.write_as_made(file, made())


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UltraMemError, match=r"none\.csv is not there\. Make it with: some command"):
        rows.read(tmp_path / "none.csv", "some command")
    for content in ("a,b\n1,2\n", "a,c\n", ""):
        (tmp_path / "other.csv").write_text(content)
        with pytest.raises(UltraMemError, match=r"holds no rows of this kind\. Make them with: it"):
            rows.read(tmp_path / "other.csv", "it", ["a", "c"])
