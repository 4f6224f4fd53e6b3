"""Sums without a flag: made by whoever writes, checked by each rank for its share, read by nobody
else."""

import functools
import hashlib
import json
import os
import shutil
import sys

import pytest

from tests.ranks import RanksFailed, run_on_ranks
from tests.training_runs import IN_BACKGROUND, run_pretrain, tiny_gpt
from ultramem_megatron.faults import integrity
from ultramem_megatron.faults.manifest import read_sums, write_sums
from ultramem_megatron.faults.shares import Share

_MEMORY = {"ultramem_spans": "1:2", "ultramem_num_keys": 12, "ultramem_topk": 6}
_FLAGS = {**_MEMORY, "ckpt_format": "torch_dist", "save_interval": 2, "train_iters": 4}


def _train(ranks=2, before=None, **changes):
    return run_pretrain(ranks, tiny_gpt(**{**_FLAGS, **changes}), before=before, print_output=True)


def _note_what_is_read(folder):
    """In every rank, from now on: the shards that it, or a process it starts, opens to read."""

    def hook(event, arguments):
        if event != "open" or not str(arguments[0]).endswith(".distcp"):
            return
        if not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            with open(folder / f"read-{os.environ['RANK']}", "a") as journal:
                journal.write(f"{os.path.basename(arguments[0])}\n")

    sys.addaudithook(hook)


def _read_by(folder, rank):
    journal = folder / f"read-{rank}"
    return set(journal.read_text().split()) if journal.exists() else set()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run = _train(save=folder, before=functools.partial(_note_what_is_read, folder))
    return folder, run


def _sums(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != integrity.MANIFEST
    }


def test_writers_sum_what_they_write_and_nobody_reads_it(saved):
    folder, _ = saved
    for iteration in ("iter_0000002", "iter_0000004"):
        assert read_sums(folder / iteration) == _sums(folder / iteration)
        assert {"__0_0.distcp", "__1_0.distcp"} <= _sums(folder / iteration).keys()
    assert _read_by(folder, 0) == _read_by(folder, 1) == set()


def test_an_asynchronous_save_is_summed_by_its_writers_too(tmp_path):
    note = functools.partial(_note_what_is_read, tmp_path)
    _train(save=tmp_path, before=note, **IN_BACKGROUND)
    assert read_sums(tmp_path / "iter_0000004") == _sums(tmp_path / "iter_0000004")
    assert _read_by(tmp_path, 0) == _read_by(tmp_path, 1) == set()


def _copied(saved, folder):
    shutil.copytree(saved[0], folder, ignore=shutil.ignore_patterns("read-*"), dirs_exist_ok=True)
    return folder / "iter_0000004"


def _damage(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_each_rank_reads_its_share_and_all_refuse(saved, tmp_path):
    _damage(_copied(saved, tmp_path) / "__1_0.distcp")
    note = functools.partial(_note_what_is_read, tmp_path)
    with pytest.raises(RanksFailed) as failed:
        _train(load=tmp_path, train_iters=6, before=note)
    message = r"iter_0000004 is damaged: __1_0.distcp: contents changed since it was saved"
    assert str(failed.value).count(f"{message}. Iteration 2 is whole") >= 2
    assert _read_by(tmp_path, 0) == {"__0_0.distcp"}
    assert "__1_0.distcp" in _read_by(tmp_path, 1)  # of the other it takes the run's flags


@pytest.mark.parametrize("damaged", ["__0_0.distcp", "__1_0.distcp"])
def test_one_rank_checks_what_two_have_written(damaged, saved, tmp_path):
    _damage(_copied(saved, tmp_path) / damaged)
    with pytest.raises(RanksFailed, match=f"{damaged}: contents changed.*--ckpt-step 2"):
        _train(1, load=tmp_path, train_iters=6)


def test_without_a_manifest_it_loads_and_says_so(saved, tmp_path, capfd):
    (_copied(saved, tmp_path) / integrity.MANIFEST).unlink()
    _train(load=tmp_path)  # has all its steps, so that the end of its output is that of loading
    printed = capfd.readouterr().out
    line = f"{tmp_path / 'iter_0000004'} has no sums: its files are read unchecked."
    assert printed.count(line) == 1
    assert f"successfully loaded checkpoint from {tmp_path}" in printed
    with pytest.raises(RanksFailed, match="start once with --no-verify-integrity"):
        _train(load=tmp_path, verify_integrity=True)


def test_sums_can_be_left_out_and_are_by_a_plain_gpt(tmp_path):
    plain = dict.fromkeys(_MEMORY)
    for name, changes in {"off": {"no_verify_integrity": True}, "plain": plain}.items():
        _train(1, save=tmp_path / name, train_iters=2, **changes)
        files = {path.name for path in (tmp_path / name / "iter_0000002").iterdir()}
        assert ".metadata" in files
        assert integrity.MANIFEST not in files


def _write_megatrons_manifest(folder):
    from megatron.core.dist_checkpointing import validation

    validation.save_integrity_manifest(str(folder))


def test_a_manifest_of_megatrons_is_believed(saved, tmp_path):
    """As checkpoints had them before, and as runs without our patches write them."""
    folder = _copied(saved, tmp_path)
    ours = json.loads((folder / integrity.MANIFEST).read_text())
    (folder / integrity.MANIFEST).unlink()
    run_on_ranks(1, _write_megatrons_manifest, folder)
    assert json.loads((folder / integrity.MANIFEST).read_text()) == ours
    assert integrity.verify(folder) == len(ours["files"])


@pytest.mark.parametrize("writers", [1, 2, 3, 8, 21])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_shares_cover_every_file_once(writers, ranks):
    shards = [f"__{writer}_{part}.distcp" for writer in range(writers) for part in (0, 1)]
    everywhere = [".metadata", "metadata.json"]
    shares = [Share(rank, ranks).of([*shards, *everywhere]) for rank in range(ranks)]
    assert all(share[-2:] == everywhere for share in shares)
    checked = [name for share in shares for name in share[:-2]]
    assert sorted(checked) == sorted(shards)
    most = max(len(share) - 2 for share in shares)
    assert most <= 2 * -(-writers // ranks)
    if writers == ranks:  # each its own
        assert all(f"__{rank}_0.distcp" in share for rank, share in enumerate(shares))


def test_a_shard_that_went_missing_before_the_manifest_is_listed(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"x")
    write_sums(tmp_path, {"__0_0.distcp": "0" * 64})
    with pytest.raises(integrity.DamagedCheckpointError, match=r"__0_0\.distcp: No such file"):
        integrity.verify(tmp_path)
