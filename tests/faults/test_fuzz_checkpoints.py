"""Whatever is done to a checkpoint's files: it is read, or refused in one line; nothing runs."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import ROOT
from tests.faults.fuzzing import TIMES, drawn
from tests.faults.planted import Call, replace_object, torch_saved
from tests.ranks import run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults import integrity
from ultramem_megatron.faults.manifest import MANIFEST

_MANIFESTS, _PAYLOADS = 300, 150


def _is_one_line(error: UltraMemError) -> None:
    assert len(str(error).splitlines()) == 1, error


_NAMES = ("__0_0.distcp", ".metadata", "metadata.json")
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["files", "algorithm", *_NAMES, "../x", ""]), inner)
    ),
    max_leaves=6,
)


def _sums(folder: Path) -> dict[str, Any]:
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _NAMES}
    return {"algorithm": "sha256", "files": files}


@st.composite
def _hurt(draw: Any) -> tuple[str, Any]:
    """What is done: to the manifest, as bytes or a change of the right one, or to a file."""
    return draw(
        st.one_of(
            st.tuples(st.just("manifest"), st.binary(max_size=60)),
            st.tuples(st.just("manifest"), _JSON.map(lambda value: json.dumps(value).encode())),
            st.tuples(st.just("key"), st.tuples(st.sampled_from(["algorithm", "files"]), _JSON)),
            st.tuples(st.just("sum"), st.tuples(st.sampled_from([*_NAMES, "x", ".."]), _JSON)),
            st.tuples(st.just("drop"), st.sampled_from(_NAMES)),
            st.tuples(st.just("file"), st.tuples(st.sampled_from(_NAMES), st.binary(max_size=9))),
            st.tuples(st.just("more"), st.sampled_from(["__1_0.distcp", "common.pt", "a b"])),
            st.tuples(st.just("nothing"), st.none()),
        )
    )


def _hurt_manifest(folder: Path, kind: str, what: Any) -> None:
    sums = _sums(folder)
    if kind == "key":
        sums[what[0]] = what[1]
    elif kind == "sum":
        sums["files"][what[0]] = what[1]
    elif kind == "drop":
        del sums["files"][what]
    (folder / MANIFEST).write_bytes(what if kind == "manifest" else json.dumps(sums).encode())
    if kind == "file":
        (folder / what[0]).write_bytes(what[1])
    elif kind == "more":
        (folder / what).write_bytes(b"1")


@pytest.mark.parametrize("times", TIMES)
def test_manifests(times):
    """A folder counts as whole only if it is."""
    whole = []

    @drawn(_MANIFESTS * times)
    @given(_hurt())
    def fuzz(hurt: tuple[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made) / "iter_0000001"
            folder.mkdir()
            for name in _NAMES:
                (folder / name).write_bytes(name.encode() * 9)
            right = _sums(folder)
            _hurt_manifest(folder, *hurt)
            integrity.verify.cache_clear()
            try:
                integrity.verify(folder)
            except UltraMemError as error:
                _is_one_line(error)
                return
            assert _sums(folder) == right
            assert sorted(path.name for path in folder.iterdir()) == sorted([*_NAMES, MANIFEST])
            whole.append(hurt)

    fuzz()
    assert ("nothing", None) in whole


_MARK = "MARK"


def _calls() -> list[Call]:
    """Each makes the file MARK in the working folder."""
    import torch

    inner = torch_saved(Call(open, _MARK, "w"))
    return [
        Call(exec, f"open({_MARK!r}, 'w')"),
        Call(eval, f"open({_MARK!r}, 'w')"),
        Call(os.system, f"touch {_MARK}"),
        Call(open, _MARK, "w"),
        Call(subprocess.check_call, ["touch", _MARK]),
        Call(shutil.copy, "/dev/null", _MARK),
        Call(Path.touch, Path(_MARK)),
        Call(torch.storage._load_from_bytes, inner),
        Call(pickle.loads, pickle.dumps(Call(open, _MARK, "w"))),
        Call(map, open, [_MARK], ["w"]),
        Call(os.mkdir, _MARK),
    ]


def _wrapped(value: Any) -> st.SearchStrategy[Any]:
    """The value in containers."""
    ways: list[Callable[[Any], Any]] = [
        lambda inner: [inner],
        lambda inner: (inner, 1),
        lambda inner: {"args": inner},
        lambda inner: OrderedDict(x=inner),
        lambda inner: Call(set, [inner]),
    ]
    return st.lists(st.sampled_from(ways), max_size=3).map(lambda chosen: _nested(value, chosen))


def _nested(value: Any, ways: list[Callable[[Any], Any]]) -> Any:
    for way in ways:
        value = way(value)
    return value


@st.composite
def _plants(draw: Any, calls: list[Call]) -> tuple[str, bytes]:
    """Where, and which bytes; or, of a file that is there, bytes that are changed."""
    where = draw(st.sampled_from([".metadata", "common_state", "common.pt", "metadata.json"]))
    if draw(st.booleans()):
        value = draw(_wrapped(draw(st.sampled_from(calls))))
        if where == "common_state" or draw(st.booleans()):
            return where, torch_saved(value)
        return where, pickle.dumps(value, protocol=draw(st.integers(0, 5)))
    return where, draw(st.binary(max_size=200))


@st.composite
def _flips(draw: Any) -> tuple[str, list[tuple[int, int]]]:
    where = draw(st.sampled_from([".metadata", "__0_0.distcp", "metadata.json"]))
    bits = st.tuples(st.integers(0, 2**20), st.integers(0, 255))
    return where, draw(st.lists(bits, min_size=1, max_size=4))


def _read_planted(whole: Path, times: int) -> dict[str, int]:
    from ultramem_megatron.megatron.checkpoint.folder import checkpoint_folder, stored_args
    from ultramem_megatron.megatron.flags.process import open_process

    open_process()
    ends = {"read": 0, "refused": 0}

    @drawn(_PAYLOADS * times)
    @given(st.one_of(_plants(_calls()), _flips()))
    def fuzz(planted: tuple[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as made:
            copy = Path(made) / "checkpoints"
            shutil.copytree(whole, copy)
            latest = copy / "iter_0000002"
            (latest / MANIFEST).unlink()  # whoever plants can mend the sums
            _plant(latest, *planted)
            try:
                stored_args(checkpoint_folder(str(copy)))
                ends["read"] += 1
            except UltraMemError as error:
                _is_one_line(error)
                ends["refused"] += 1
        assert not Path(_MARK).exists()

    fuzz()
    return ends


def _plant(latest: Path, where: str, what: Any) -> None:
    if where == "common_state":
        replace_object(latest, where, what)
    elif isinstance(what, bytes):
        (latest / where).write_bytes(what)
    else:
        content = bytearray((latest / where).read_bytes())
        for place, value in what:
            content[place % len(content)] = value
        (latest / where).write_bytes(content)


@pytest.mark.parametrize("times", TIMES)
def test_payloads(times, tmp_path, monkeypatch):
    """Nothing that is planted into what flags are read from runs."""
    monkeypatch.chdir(tmp_path)
    whole = tmp_path / "whole"
    memory = {"ultramem_spans": "1:2", "ultramem_num_keys": 12, "ultramem_topk": 6}
    run_pretrain(
        1,
        tiny_gpt(
            **memory,
            save=whole,
            save_interval=2,
            train_iters=2,
            ckpt_format="torch_dist",
            verify_integrity=True,
        ),
    )
    (ends,) = run_on_ranks(1, _read_planted, whole, times, timeout=600)
    print(ends)
    assert ends["refused"] >= 60 * times
    assert ends["read"] >= 3 * times


def _unpickled(folder: Path) -> None:
    os.chdir(folder)
    for call in _calls():
        made = pickle.loads(pickle.dumps(call))
        if isinstance(made, map):
            next(made)
        assert Path(_MARK).exists(), call.call
        shutil.rmtree(_MARK) if Path(_MARK).is_dir() else Path(_MARK).unlink()


def test_the_payloads_are_some(tmp_path):
    """Unpickled as anybody would, each leaves its mark: without Megatron, which defuses one."""
    module = _unpickled.__module__
    code = f"import pathlib, {module} as here; here._unpickled(pathlib.Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
