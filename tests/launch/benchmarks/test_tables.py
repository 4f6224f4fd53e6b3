"""The benchmark of tables on disk: its cases and their hits, and what it refuses."""

import csv
import sys

import numpy as np
import pytest

from launch.benchmarks.tables import main
from tests.decoding import NumberTokenizer, random_model
from tests.ranks import RanksFailed, run_on_ranks
from tests.training_runs import make_saving_fast
from ultramem_megatron.data import indexed
from ultramem_megatron.errors import UltraMemError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")


def _save(folder):
    from ultramem_megatron.megatron.checkpoint.weights import save_weights

    make_saving_fast()
    save_weights(*random_model("ultramem-conv"), folder / "checkpoint")


def _measure(folder, *flags):
    from ultramem_megatron.inference import loading

    loading.open_model_tokenizer = lambda _: NumberTokenizer()
    given = ["--load", str(folder / "checkpoint"), "--data", str(folder / "data")]
    small = ["--texts", "2", "--prompt", "4", "--tokens", "5", "--rounds", "1"]
    main([*given, "--out", str(folder / "out"), *small, *flags])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    run_on_ranks(1, _save, folder)
    indexed.write(folder / "data", [np.arange(30).tolist()], 512)
    return folder


@pytest.mark.long
def test_a_row_for_each_start_and_share(files):
    run_on_ranks(1, _measure, files, "--shares", "0.1", "1")
    with (files / "out/tables.csv").open(newline="") as file:
        found = {(row["share"], row["start"]): row for row in csv.DictReader(file)}
    assert len(found) == 6 + 1 - 1  # the device's and the first of the disk's are one key
    assert float(found["1.0", "cold"]["hit_rate"]) > float(found["0.1", "cold"]["hit_rate"])
    assert float(found["1.0", "warm"]["hit_rate"]) > float(found["1.0", "cold"]["hit_rate"]) > 0
    assert found["1.0", "cold"]["reads"] == found["0.1", "warm"]["reads"]
    assert all(float(row["tokens_per_second"]) > 0 for row in found.values())


@pytest.mark.long
def test_a_text_that_is_too_short_or_too_long_is_refused(files):
    with pytest.raises(RanksFailed, match="too few for 1 rounds of 20 texts of 4"):
        run_on_ranks(1, _measure, files, "--texts", "10")
    with pytest.raises(RanksFailed, match="--tokens 90 exceed the model's"):
        run_on_ranks(1, _measure, files, "--tokens", "90")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--texts 0", "--texts is 0; it must be at least 1"),
        ("--shares 0.1 2", r"--shares has 2\.0; each must be more than 0 and at most 1"),
    ],
)
def test_wrong_flags_are_refused(words, message, tmp_path):
    given = ["--load", "x", "--data", "y", "--out", str(tmp_path)]
    with pytest.raises(UltraMemError, match=message):
        main([*given, *words.split()])
