"""Inspecting a trained model: what the CSVs say is what the memories read."""

import csv

import pytest

from tests.ranks import run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt

_FLAGS = {
    "ultramem_spans": "1:2",
    "ultramem_num_keys": 8,
    "ultramem_key_dim": 8,
    "ultramem_value_dim": 8,
    "ultramem_topk": 3,
    "save_interval": 3,
}
TEXT = "7 8 9 7 7"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    run_pretrain(1, tiny_gpt(**_FLAGS, save=folder / "model", tensorboard_dir=folder / "events"))
    return folder


def _inspect(folder, *flags):
    from ultramem_megatron.tools.inspect.__main__ import main

    text = folder / "text.txt"
    text.write_text(TEXT)
    main(
        ["--load", str(folder / "model"), "--text", str(text), "--out", str(folder / "out"), *flags]
    )


def _lines(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_csvs_and_pictures(checkpoint):
    run_on_ranks(1, _inspect, checkpoint, "--top", "6")
    out = checkpoint / "out"
    fired = _lines(out / "fired.csv")
    assert [line["token"] for line in fired[::6]] == TEXT.split()
    assert {int(line["value"]) for line in fired} <= set(range(64))
    scores = [float(line["score"]) for line in fired]
    for start in range(0, 30, 6):
        assert scores[start : start + 6] == sorted(scores[start : start + 6], reverse=True)
    # A token reads m*H = 6 values: the three CSVs count the same reads.
    shared = _lines(out / "shared.csv")
    reads = sum(int(line["token_reads"]) for line in shared)
    assert reads == sum(int(line["reads"]) for line in _lines(out / "grid.csv")) == 5 * 6
    of_seven = sum(int(line["token_reads"]) for line in shared if line["token"] == "7")
    assert of_seven == 3 * 6
    usage = _lines(out / "usage.csv")
    assert {line["step"] for line in usage if line["metric"] == "values-used"} == {"1", "2", "3"}
    for picture in ("grid.png", "usage.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def _refusal(folder, *flags):
    from ultramem_megatron.errors import UltraMemError

    with pytest.raises(UltraMemError) as raised:
        _inspect(folder, *flags)
    return str(raised.value)


def test_wrong_numbers_are_refused(checkpoint):
    (message,) = run_on_ranks(1, _refusal, checkpoint, "--top", "0")
    assert message == "--top 0: must be a whole number >= 1."


def test_a_model_without_memories_is_refused(tmp_path):
    run_pretrain(1, tiny_gpt(save=tmp_path / "model", save_interval=3))
    (message,) = run_on_ranks(1, _refusal, tmp_path)
    assert "has no memory layers" in message
