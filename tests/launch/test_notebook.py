"""The notebook's cells, run in order on what inspect wrote, draw what stands in fired.csv."""

import csv
import json

import matplotlib.pyplot as plt
import pytest

from tests import ROOT
from tests.tools.export.test_hf_folder import _plain
from ultramem_megatron.tools.export.hf_folder import save_hf
from ultramem_megatron.tools.export.hf_tokenizer import HFTokenizer
from ultramem_megatron.tools.inspect.__main__ import main

_NOTEBOOK = ROOT / "launch/serving/fired.ipynb"
_TEXT = "7 8 9 7 7 30 31"


def _cells():
    return json.loads(_NOTEBOOK.read_text(encoding="utf-8"))["cells"]


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """The folder of results, and the names that the cells left."""
    save_hf(_plain(), tmp_path / "hf", HFTokenizer(), "card")
    (tmp_path / "text").write_text(_TEXT)
    out = tmp_path / "runs/inspected"
    main(["--load", f"{tmp_path}/hf", "--text", f"{tmp_path}/text", "--out", str(out)])
    home = tmp_path / "launch/serving"
    home.mkdir(parents=True)
    monkeypatch.chdir(home)
    plt.switch_backend("Agg")
    plt.close("all")
    names = {}
    for number, cell in enumerate(_cells()):
        if cell["cell_type"] == "code":
            code = compile("".join(cell["source"]), f"{_NOTEBOOK.name}, cell {number}", "exec")
            exec(code, names)
    yield out, names
    plt.close("all")


def test_pictures_are_of_the_csv(executed):
    out, names = executed
    with (out / "fired.csv").open(newline="") as file:
        fired = list(csv.DictReader(file))
    scores, sharing = (plt.figure(number) for number in plt.get_fignums())
    [image] = scores.axes[0].get_images()
    tokens = [label.get_text() for label in scores.axes[0].get_yticklabels()]
    assert tokens == [repr(token) for token in _TEXT.split()]
    values = {row["value"] for row in fired}
    assert image.get_array().shape == (len(tokens), len(values))
    best = {}
    for row in fired:
        key = row["position"], row["value"]
        best[key] = max(best.get(key, 0), float(row["score"]), key=abs)
    assert float(image.get_array().sum()) == pytest.approx(sum(best.values()), abs=1e-6)
    [line] = sharing.axes[0].get_lines()
    assert sum(line.get_ydata()) == len(values)
    assert sum(found.total() for found in names["readers"].values()) == len(fired)


def test_it_is_kept_without_outputs():
    for cell in _cells():
        assert not cell.get("outputs"), "clear all outputs before it is committed"
        assert not cell.get("execution_count")
