"""Data sets that are cut short, missing or not of their index are refused, with file and sizes."""

import os
from argparse import Namespace

import numpy as np
import pytest

from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.data import indexed
from ultramem_megatron.data.check import check_data, check_prefixes
from ultramem_megatron.errors import UltraMemError


def _write(prefix, documents, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 40, documents)
    indexed.write(prefix, (random.integers(0, 500, n).tolist() for n in lengths), 512)
    return str(prefix)


@pytest.fixture
def prefix(tmp_path):
    return _write(tmp_path / "text", 60)


def _cut(path, count):
    os.truncate(path, os.path.getsize(path) - count)


def test_whole_data_sets_pass(prefix, tmp_path):
    check_prefixes([prefix, _write(tmp_path / "one", 1), "s3://bucket/not-looked-at"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: os.remove(f"{p}.bin"), r"text\.bin: No such file"),
        (lambda p: os.remove(f"{p}.idx"), r"text\.idx: No such file"),
        (lambda p: _cut(f"{p}.bin", 2), r"text\.bin has .* its index text\.idx describes"),
        (lambda p: _cut(f"{p}.idx", 8), r"text\.idx is cut short: .* of at least"),
        (lambda p: os.truncate(f"{p}.idx", 20), r"text\.idx is cut short: 20 bytes"),
        (lambda p: os.truncate(f"{p}.idx", 0), r"text\.idx is not an index"),
    ],
    ids=["no bin", "no idx", "bin cut", "idx cut", "header cut", "idx empty"],
)
def test_damage_is_named(prefix, damage, message):
    damage(prefix)
    with pytest.raises(UltraMemError, match=message):
        check_prefixes([prefix])


def test_an_index_of_other_data_is_found(prefix, tmp_path):
    other = _write(tmp_path / "other", 60, seed=1)
    os.replace(f"{other}.idx", f"{prefix}.idx")
    with pytest.raises(UltraMemError, match="of different data"):
        check_prefixes([prefix])


@pytest.mark.parametrize("flag", ["data_path", "train_data_path"])
def test_a_run_refuses_before_it_builds_a_model(prefix, flag):
    flags = tiny_gpt(
        mock_data=None, **{flag: prefix}, split="100,0,0" if flag == "data_path" else None
    )
    assert len(run_pretrain(1, flags).losses) == 3
    _cut(f"{prefix}.bin", 100)
    with pytest.raises(RanksFailed, match=r"text\.bin has") as refused:
        run_pretrain(1, flags)
    assert "building GPT model" not in str(refused.value)


def test_data_of_other_formats_are_not_looked_at():
    for given in ({"mock_data": True}, {"mock_data": False, "sft": True}):
        check_data(Namespace(data_path=["no/such/file.jsonl"], **given))
