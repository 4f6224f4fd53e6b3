"""FBGEMM's row: from an environment of its own, here with a stand-in; left out where there is none.

With FBGEMM itself: launch/benchmarks/setup_fbgemm.sh, then `ultramem bench kernels run`.
"""

import sys
from pathlib import Path

import pytest
import torch

from launch.benchmarks.kernels import fbgemm
from launch.benchmarks.kernels.shapes import Shape
from ultramem_megatron.errors import UltraMemError

_TINY = Shape(tokens=4, hidden=16, num_keys=8, topk=4, value_dim=8)
_CPU = torch.device("cpu")

# What the row needs of FBGEMM, by PyTorch's own.
_CONFIGS = """
class SparseType:
    @staticmethod
    def from_dtype(dtype):
        return dtype
"""
_OPS = """
import torch

class DenseTableBatchedEmbeddingBagsCodegen:
    def __init__(self, tables, weights_precision, output_dtype, use_cpu):
        (self.shape,) = tables

    def __call__(self, indices, offsets, per_sample_weights):
        return torch.nn.functional.embedding_bag(
            indices, self.weights.view(self.shape), offsets[:-1], mode="sum",
            per_sample_weights=per_sample_weights,
        )
"""


def _environment(folder: Path, script: str) -> None:
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


def test_it_is_timed_in_its_environment(tmp_path, monkeypatch):
    package = tmp_path / "packages" / "fbgemm_gpu"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "split_embedding_configs.py").write_text(_CONFIGS)
    (package / "split_table_batched_embeddings_ops_training.py").write_text(_OPS)
    path = f'export PYTHONPATH="$PYTHONPATH:{package.parent}"'
    _environment(tmp_path, f'{path}\nexec {sys.executable} "$@"')
    monkeypatch.setenv("FBGEMM_ENV", str(tmp_path))
    found = list(fbgemm.rows(_TINY, _CPU, 1e-5))
    assert [row["passes"] for row in found] == ["forward", "forward+backward"]
    for row in found:
        assert row["candidate"] == "FBGEMM TBE, dense gradient"
        assert row["ms_min"] > 0
        assert row["error"] < 1e-5
        assert row["torch"] == torch.__version__


def test_what_fails_there_is_an_error(tmp_path, monkeypatch):
    _environment(tmp_path, "echo 'Traceback\nImportError: libcurand' >&2; exit 1")
    monkeypatch.setenv("FBGEMM_ENV", str(tmp_path))
    with pytest.raises(UltraMemError, match=r"status 1: ImportError: libcurand .*setup_fbgemm"):
        list(fbgemm.rows(_TINY, _CPU, 1e-5))


def test_without_its_environment_it_is_left_out_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FBGEMM_ENV", str(tmp_path / "none"))
    assert list(fbgemm.rows(_TINY, _CPU, 1e-5)) == []
    assert "FBGEMM left out: no " in capsys.readouterr().out
    assert (Path(fbgemm.__file__).parents[1] / "setup_fbgemm.sh").exists()
