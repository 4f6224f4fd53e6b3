"""Pictures: saved when drawn, one colour for each model."""

import sys

import pytest

from tests.ranks import run_on_ranks
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.pictures import colours, picture


def test_a_picture_is_saved_when_it_is_drawn(tmp_path):
    file = tmp_path / "new" / "some.png"
    with picture(file, (3, 2), dpi=50) as figure:
        figure.subplots().plot([1, 2])
        assert not file.exists()
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
    assert (width, height) == (150, 100)


def test_half_a_picture_is_not_saved(tmp_path):
    with pytest.raises(ZeroDivisionError), picture(tmp_path / "some.png", (3, 2)) as figure:
        figure.subplots().plot([1 / 0])
    assert not list(tmp_path.iterdir())


def test_a_kind_of_file_that_is_no_picture_is_refused(tmp_path):
    with (
        pytest.raises(UltraMemError, match=r"some\.csv: the name of a picture must end in \.eps"),
        picture(tmp_path / "some.csv", (3, 2)),
    ):
        pass


def _draw_without_display(file):
    with picture(file, (3, 2)) as figure:
        figure.subplots()
    return "matplotlib.pyplot" in sys.modules


def test_drawing_needs_no_display_and_leaves_nothing_open(tmp_path):
    assert run_on_ranks(1, _draw_without_display, tmp_path / "some.png") == [False]


def test_a_model_has_one_colour_in_all_pictures():
    one, other = colours(["ultramem", "no-norms", "naive-init"]), colours(["Dense", "UltraMem"])
    assert one["ultramem"] == other["UltraMem"]
    assert len({*one.values(), *other.values()}) == 4
