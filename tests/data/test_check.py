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


def _flags(**changes):
    given = {
        **dict.fromkeys(
            (
                "data_path",
                "data_args_path",
                "train_data_path",
                "valid_data_path",
                "test_data_path",
                "per_split_data_args_path",
                "split",
            )
        ),
        "mock_data": False,
        "skip_train": False,
        "full_validation": False,
        "eval_iters": 1,
        "padded_vocab_size": 512,
    }
    return Namespace(**{**given, **changes})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"split": "100,0,0"}, "--split 100,0,0 leaves no data for validation. .* --eval-iters 0"),
        ({"split": "100"}, "leaves no data for validation"),
        ({"split": "0,1,0"}, "--split 0,1,0 leaves no data for training"),
        ({"split": "969, 30, 1"}, "--split 969, 30, 1 leaves none of the 60 documents of .* test"),
        ({"split": "999,1,0", "eval_iters": 0}, "leaves none of the 60 .* for validation"),
        ({"split": "0,0,0"}, "--split 0,0,0: must be three numbers"),
        ({"split": "much,little"}, "--split much,little: must be three numbers"),
        ({"split": "1,2,3,4"}, "must be three numbers"),
        ({"split": "99,1,0", "data_path": [""]}, "a data path is empty"),
    ],
)
def test_splits_without_documents_are_refused(prefix, flags, message):
    with pytest.raises(UltraMemError, match=message):
        check_data(_flags(**{"data_path": [prefix], **flags}))


def test_splits_that_leave_what_is_asked_for_pass(prefix):
    for flags in (
        {"split": "90,10,0"},
        {"split": "100,0,0", "eval_iters": 0},
        {"split": "0,100,0", "skip_train": True},
    ):
        check_data(_flags(data_path=[prefix], **flags))
    check_data(_flags(train_data_path=[prefix], valid_data_path=["1", prefix]))


def test_validation_without_its_path_is_refused(prefix):
    with pytest.raises(UltraMemError, match=r"no data for validation. Give --valid-data-path, or"):
        check_data(_flags(train_data_path=[prefix]))
    with pytest.raises(UltraMemError, match=r"no data for training. Give --train-data-path"):
        check_data(_flags(valid_data_path=[prefix]))
    check_data(_flags(train_data_path=[prefix], eval_iters=0))


def _tokens_with(path, place, token, count):
    """A data set of one type of token with another value in one place."""
    tokens = np.full(count, 7)
    tokens[place] = token
    indexed.write(path, np.array_split(tokens, count // 50_000), token + 1)
    return str(path)


@pytest.mark.parametrize("place", [0, 1_000_000, -1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("token", [512, 65_000, 100_000])
def test_tokens_beyond_the_vocabulary_are_refused(tmp_path, place, token):
    prefix = _tokens_with(tmp_path / "text", place, token, 2_000_000)
    check_prefixes([prefix], token + 1)
    message = rf"text.bin holds token {token}, the model's vocabulary has {token} entries"
    with pytest.raises(UltraMemError, match=message):
        check_prefixes([prefix], token)


def test_a_run_refuses_tokens_of_another_vocabulary(tmp_path):
    prefix = _tokens_with(tmp_path / "text", 3, 512, 100_000)
    with pytest.raises(RanksFailed, match=r"text.bin holds token 512") as refused:
        run_pretrain(
            2, tiny_gpt(mock_data=None, train_data_path=prefix, tensor_model_parallel_size=2)
        )
    assert "building GPT model" not in str(refused.value)


def test_data_sets_of_empty_documents_are_refused(tmp_path):
    indexed.write(tmp_path / "text", [[], [], []], 512)
    with pytest.raises(UltraMemError, match=r"text.bin is empty: all its documents are"):
        check_prefixes([str(tmp_path / "text")])


@pytest.mark.parametrize("code", [0, 6, 7, 9, 200])
def test_unknown_types_of_tokens_are_named(prefix, code):
    _overwrite(f"{prefix}.idx", 17, bytes([code]))
    with pytest.raises(UltraMemError, match=rf"text.idx has tokens of the unknown type {code};"):
        check_prefixes([prefix])


def _overwrite(file, offset, raw):
    with open(file, "r+b") as opened:
        opened.seek(offset)
        opened.write(raw)


def test_every_flipped_bit_of_an_index_is_found(tmp_path):
    """But where a document begins between its neighbours: nothing else tells that."""
    prefix = _write(tmp_path / "small", 4)
    file = tmp_path / "small.idx"
    whole = file.read_bytes()
    check_prefixes([prefix], 512)
    inner = range(8 * (len(whole) - 4 * 8), 8 * (len(whole) - 8))
    for bit in sorted({*range(8 * len(whole))} - {*inner}):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(UltraMemError, match=r"small\.(idx|bin)"):
            check_prefixes([prefix], 512)


def test_a_large_index_is_looked_at_in_three_places(tmp_path):
    count = 1_000_000
    indexed.write(tmp_path / "many", ([token % 500] for token in range(count)), 512)
    prefix, lengths = str(tmp_path / "many"), 9 + 25
    check_prefixes([prefix], 512)
    for place in (0, count // 2, count - 2):
        _overwrite(f"{prefix}.idx", lengths + 4 * place, b"\2")
        with pytest.raises(UltraMemError, match=r"many.idx contradicts itself among sequences"):
            check_prefixes([prefix], 512)
        _overwrite(f"{prefix}.idx", lengths + 4 * place, b"\1")
    check_prefixes([prefix], 512)


def test_data_of_other_formats_are_not_looked_at():
    for given in ({"mock_data": True}, {"mock_data": False, "sft": True}):
        check_data(Namespace(data_path=["no/such/file.jsonl"], **given))
