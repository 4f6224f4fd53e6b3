"""A cache of data sets that holds more than numbers: nothing of it runs, the file is named."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.safe_globals import safe_numpy_load as upstream

from patches.defects import dataset_cache
from tests.data.test_check import _write
from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.errors import UltraMemError

RAN = "ran"  # a file in the working folder that a payload makes


class Payload:
    """Makes a file when unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, (RAN, "w")


class Nested:
    """A payload behind a name that Megatron's list allows (it refuses what is inside)."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        inner = io.BytesIO()
        torch.save(Payload(), inner)
        return torch.storage._load_from_bytes, (inner.getvalue(),)


def objects() -> bytes:
    raw = io.BytesIO()
    np.save(raw, np.array([Payload()], dtype=object), allow_pickle=True)
    return raw.getvalue()


def archive() -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as opened:
        opened.writestr("shuffle_index.npy", objects())
    return raw.getvalue()


def cut_short() -> bytes:
    raw = io.BytesIO()
    np.save(raw, np.arange(1000))
    return raw.getvalue()[:-100]


PLANTED = {
    "a pickle": pickle.dumps(Payload()),
    "a pickle behind an allowed name": pickle.dumps(Nested()),
    "an array of objects": objects(),
    "an archive": archive(),
    "cut short": cut_short(),
    "empty": b"",
}


@pytest.mark.parametrize("raw", PLANTED.values(), ids=PLANTED.keys())
def test_nothing_planted_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index.npy").write_bytes(raw)
    for mode in ("r", None):
        with pytest.raises(UltraMemError, match=r"index.npy of the data sets' cache is damaged"):
            dataset_cache.safe_numpy_load(tmp_path / "index.npy", allow_pickle=True, mmap_mode=mode)
    assert not (tmp_path / RAN).exists()


def test_upstream_does_not_name_the_file(tmp_path: Path) -> None:
    """Where this fails, half the reason for the patch is gone."""
    (tmp_path / "index.npy").write_bytes(PLANTED["cut short"])
    with pytest.raises(ValueError, match="mmap length") as refused:
        upstream(tmp_path / "index.npy", allow_pickle=True, mmap_mode="r")
    assert "index.npy" not in str(refused.value)


def test_arrays_are_mapped_as_before(tmp_path: Path) -> None:
    np.save(tmp_path / "index.npy", np.arange(6).reshape(3, 2))
    found = dataset_cache.safe_numpy_load(tmp_path / "index.npy", allow_pickle=True, mmap_mode="r")
    assert isinstance(found, np.memmap)
    assert found.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_a_run_on_a_planted_cache_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    flags = tiny_gpt(
        mock_data=None, train_data_path=_write(tmp_path / "text", 60), data_cache_path=cache
    )
    losses = run_pretrain(1, flags).losses
    assert run_pretrain(1, flags).losses == losses  # from the cache
    (planted,) = cache.glob("*-shuffle_index.npy")
    planted.write_bytes(pickle.dumps(Nested()))
    with pytest.raises(RanksFailed, match=r"shuffle_index.npy of the data sets' cache is damaged"):
        run_pretrain(1, flags)
    assert not Path(RAN).exists()
