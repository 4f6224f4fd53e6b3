"""Damaged checkpoints are found before they are read, by file name, and an older one is offered."""

import hashlib
import json
import os
import re
from argparse import Namespace

import pytest

from tests.ranks import RanksFailed, run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults import integrity
from ultramem_megatron.faults.integrity import DamagedCheckpointError
from ultramem_megatron.megatron.checkpoint.folder import loaded_iteration
from ultramem_megatron.megatron.checkpoint.source import check_sums, source_of_weights

_FLAGS = {
    "ultramem_spans": "1:2",
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
    "ckpt_format": "torch_dist",
    "verify_integrity": True,
    "save_interval": 2,
}


def _train(**changes):
    return run_pretrain(2, tiny_gpt(**{**_FLAGS, **changes}))


@pytest.fixture(scope="module")
def undisturbed():
    return _train(train_iters=6, save_interval=None).losses


@pytest.fixture
def saved(tmp_path):
    _train(save=tmp_path, train_iters=6)
    integrity.verify.cache_clear()
    return tmp_path


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def _flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


_DAMAGES = [
    ("__0_0.distcp", _truncate),
    ("__1_0.distcp", _flip_a_bit),
    ("__1_0.distcp", lambda file: file.unlink()),
    (".metadata", _flip_a_bit),
    ("metadata.json", _truncate),
]


def _check(folder, **changes):
    args = {
        "load": str(folder),
        "verify_integrity": True,
        "ckpt_format": "torch_dist",
        "ckpt_step": None,
        "sums_required": True,
    }
    args = Namespace(**{**args, **changes})
    check_sums(source_of_weights(args), args)


def test_every_damage_is_named_and_the_previous_checkpoint_offered(saved):
    latest = saved / "iter_0000006"
    _check(saved)
    for name, damage in _DAMAGES:
        integrity.verify.cache_clear()
        whole = (latest / name).read_bytes()
        damage(latest / name)
        with pytest.raises(DamagedCheckpointError) as refused:
            _check(saved)
        assert f"{name}: " in str(refused.value)
        assert "--ckpt-step 4" in str(refused.value)
        (latest / name).write_bytes(whole)
    integrity.verify.cache_clear()
    _check(saved)


def test_a_damaged_run_is_refused_and_the_offered_step_continues(saved, undisturbed):
    _flip_a_bit(saved / "iter_0000006" / "__0_0.distcp")
    _truncate(saved / "iter_0000004" / "__1_0.distcp")
    with pytest.raises(RanksFailed, match=r"__0_0\.distcp: contents changed.*--ckpt-step 2"):
        _train(load=saved, train_iters=8)
    assert _train(load=saved, train_iters=6, ckpt_step=2).losses == undisturbed[2:]


def test_a_tracker_cut_short_is_put_right(saved, undisturbed):
    tracker = saved / integrity.TRACKER
    _truncate(saved / "iter_0000006" / "__0_0.distcp")
    tracker.write_text("")
    assert _train(load=saved, train_iters=6).losses == undisturbed[4:]
    assert tracker.read_text() == "4"


def test_a_checkpoint_without_sums_says_how_to_load_it(saved):
    (saved / "iter_0000006" / integrity.MANIFEST).unlink()
    with pytest.raises(DamagedCheckpointError, match="start once with --no-verify-integrity"):
        _check(saved)
    _check(saved, verify_integrity=False)
    integrity.main([str(saved)])


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("null", "is no list of sums"),
        ("[1]", "is no list of sums"),
        ("5", "is no list of sums"),
        ('{"files": null}', "is no list of sums"),
        ('{"files": {}}', r"lists no file"),
        ('{"files": {"a": 1}}', "has no SHA-256 for a"),
        ('{"files": {"../a": "0"}}', "names '../a', which is no file of the folder"),
        (r'{"files": {"a\u0000b": "0"}}', "which is no file of the folder"),
        (r'{"files": {"\ud800": "0"}}', "which is no file of the folder"),
        ('{"algorithm": "md5", "files": {}}', "sums of the kind 'md5', not sha256"),
        ("[" * 100_000, "no readable integrity.json"),
        (b"\xff\xfe\x00", "no readable integrity.json"),
    ],
)
def test_an_odd_manifest_is_damage(manifest, message, tmp_path, capsys):
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    content = manifest if isinstance(manifest, bytes) else manifest.encode()
    (folder / integrity.MANIFEST).write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=message):
        integrity.check_iteration(folder)
    integrity.main([str(tmp_path)])
    assert re.search(message, capsys.readouterr().out)


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)],
    ids=["pipe", "device", "link to itself"],
)
@pytest.mark.parametrize("name", [integrity.MANIFEST, "metadata.json", "__0_0.distcp", "more"])
def test_what_would_be_read_for_ever_is_damage(name, make, tmp_path):
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    (folder / integrity.MANIFEST).write_text('{"files": {}}')
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    message = f"{name}: a pipe, a device or a link to nothing"
    with pytest.raises(UltraMemError, match=message):
        loaded_iteration(str(tmp_path), 3)
    with pytest.raises(DamagedCheckpointError, match=message):
        integrity.verify(folder)


def test_a_file_without_a_sum_is_damage(tmp_path):
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    sums = {}
    for name in ("__0_0.distcp", ".metadata"):
        (folder / name).write_text(name)
        sums[name] = hashlib.sha256(name.encode()).hexdigest()
    manifest = folder / integrity.MANIFEST
    manifest.write_text(json.dumps({"algorithm": "sha256", "files": sums}))
    assert integrity.verify(folder) == 2
    integrity.verify.cache_clear()
    del sums[".metadata"]
    manifest.write_text(json.dumps({"algorithm": "sha256", "files": sums}))
    with pytest.raises(DamagedCheckpointError, match=r"has no sum of \.metadata"):
        integrity.verify(folder)


def test_no_whole_checkpoint_at_all(saved):
    for iteration in integrity.iterations(saved):
        _truncate(integrity.iteration_folder(saved, iteration) / "__0_0.distcp")
    with pytest.raises(DamagedCheckpointError, match="No older checkpoint there is whole"):
        _check(saved)
    (saved / integrity.TRACKER).write_text("")
    with pytest.raises(DamagedCheckpointError, match="no checkpoint beside it is whole"):
        _check(saved)


def test_listing(saved, capsys):
    _truncate(saved / "iter_0000004" / "__1_0.distcp")
    (saved / "iter_0000002" / integrity.MANIFEST).unlink()
    integrity.main([str(saved)])
    newest, damaged, unfinished = capsys.readouterr().out.splitlines()
    assert newest.split() == ["6", "whole", "(4", "files)"]
    assert "iter_0000004 is damaged: __1_0.distcp" in damaged
    assert "unfinished" in unfinished


def _save_release(folder):
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.megatron.checkpoint.weights import save_weights

    flags = {**_FLAGS, "save_interval": None, "verify_integrity": None}
    save_weights(*untrained_model(tiny_gpt(**flags)), folder)


def _decode(folder):
    from ultramem_megatron.inference.loading import load_model

    load_model(str(folder))


def test_weights_alone_have_sums_too(tmp_path):
    """A run may start from them with --verify-integrity, and damage is found by whatever reads."""
    run_on_ranks(1, _save_release, tmp_path)
    _check(tmp_path)
    assert len(_train(load=tmp_path, train_iters=2).losses) == 2
    run_on_ranks(1, _decode, tmp_path)
    _truncate(tmp_path / "release" / "__0_0.distcp")
    integrity.verify.cache_clear()
    message = r"release is damaged: __0_0\.distcp: contents changed.*Write it anew"
    with pytest.raises(DamagedCheckpointError, match=message):
        _check(tmp_path)
    with pytest.raises(RanksFailed, match=message):
        run_on_ranks(1, _decode, tmp_path)


def test_decoding_refuses_what_is_damaged(saved):
    _flip_a_bit(saved / "iter_0000006" / "__0_0.distcp")
    with pytest.raises(RanksFailed, match=r"__0_0\.distcp: contents changed.*--ckpt-step 4"):
        run_on_ranks(1, _decode, saved)
