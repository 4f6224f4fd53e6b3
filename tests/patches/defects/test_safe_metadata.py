"""A checkpoint whose .metadata would run a command is refused, and the command is not run."""

import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.patches import registry


@pytest.fixture(autouse=True)
def _patched():
    registry.apply_all(["defects.safe_metadata"])
    yield
    registry.revert_all()


class _Call:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_a_real_checkpoint_is_read(tmp_path):
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "c": [1],
    }
    save(tensors, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    metadata = FileSystemReader(tmp_path).read_metadata()
    assert metadata.state_dict_metadata["a"].size == torch.Size([2, 3])


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (exec, "builtins.exec"),
        (eval, "builtins.eval"),
        (torch.hub.load, "torch.hub.load"),
        (torch.load, "torch.serialization.load"),
    ],
)
def test_a_call_is_refused_and_not_made(tmp_path, function, name):
    mark = tmp_path / "called"
    (tmp_path / ".metadata").write_bytes(
        pickle.dumps(_Call(function, f"open({str(mark)!r}, 'w').close()"))
    )
    with pytest.raises(UltraMemError, match=name.replace(".", r"\.")):
        FileSystemReader(tmp_path).read_metadata()
    assert not mark.exists()


def test_a_dotted_name_is_refused(tmp_path):
    name, module = b"os.getcwd", b"torch.distributed.checkpoint.filesystem"
    pickled = (
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module
        + b"\x8c"
        + bytes([len(name)])
        + name
        + b"\x93)R."
    )
    (tmp_path / ".metadata").write_bytes(pickled)
    with pytest.raises(UltraMemError, match=r"os\.getcwd"):
        FileSystemReader(tmp_path).read_metadata()
