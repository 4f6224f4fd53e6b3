"""Inspecting a trained model: what the CSVs say is what the memories read."""

import csv

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.export.opened_folder import open_folder

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
    run_on_ranks(1, _inspect, folder, "--top", "6")
    return folder


def _inspect(folder, *flags, load="model", out="out"):
    from ultramem_megatron.tools.inspect.__main__ import main

    text = folder / "text.txt"
    text.write_text(TEXT)
    main(["--load", str(folder / load), "--text", str(text), "--out", str(folder / out), *flags])


def _export(folder):
    from ultramem_megatron.tools.export.__main__ import main

    main(["--load", str(folder / "model"), "--to", "hf", str(folder / "hf")])


def _lines(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_csvs_and_pictures(checkpoint):
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


@pytest.fixture(scope="module")
def folders(checkpoint):
    """hf, and from it int8, fp8 and bf16."""
    from ultramem_megatron.tools.quantize import quantize

    run_on_ranks(1, _export, checkpoint)
    for kind in ("int8", "fp8"):
        quantize(checkpoint / "hf", checkpoint / kind, kind, None)
    low = open_folder(checkpoint / "hf").model.to(torch.bfloat16)
    low.save_pretrained(checkpoint / "bf16")
    return checkpoint


# The one memory is in the first layer: what it reads depends on no value.
@pytest.mark.parametrize("kind", ["hf", "int8", "fp8"])
def test_a_folder_for_transformers_gives_the_same_csvs(folders, kind):
    _inspect(folders, "--top", "6", load=kind, out=f"from_{kind}")
    ours, theirs = (_lines(folders / out / "fired.csv") for out in ("out", f"from_{kind}"))
    scores, given = ([float(line.pop("score")) for line in lines] for lines in (ours, theirs))
    assert given == pytest.approx(scores, abs=2e-4)
    assert theirs == ours
    for name in ("shared.csv", "grid.csv"):
        assert _lines(folders / f"from_{kind}" / name) == _lines(folders / "out" / name)
    assert (folders / f"from_{kind}/grid.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_in_bf16_reads_nearly_the_same(folders):
    _inspect(folders, "--top", "6", load="bf16", out="from_bf16")
    read = [
        {(line["position"], line["value"], line["group"]) for line in _lines(folders / out)}
        for out in ("out/fired.csv", "from_bf16/fired.csv")
    ]
    assert len(read[0]) == len(read[1]) == 30
    assert len(read[0] & read[1]) > 20


def test_what_folders_for_transformers_have_not_is_refused(folders):
    with pytest.raises(UltraMemError, match="--ckpt-step is of checkpoints"):
        _inspect(folders, "--ckpt-step", "3", load="hf")
    opened = open_folder(folders / "hf")
    with pytest.raises(UltraMemError, match=r"--text 'seven' is no list of ids"):
        opened.ids("seven", "--text")
    with pytest.raises(UltraMemError, match=r"has the id 900; .* from 0 to"):
        opened.ids("7 900", "--text")


def _refusal(folder, *flags):
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
