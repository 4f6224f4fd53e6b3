"""A real checkpoint with a payload planted into one of its files: a pickle that makes a file."""

import dataclasses
import hashlib
import io
import json
import pickle
import shutil
from pathlib import Path

from tests.ranks import run_on_ranks
from ultramem_megatron.faults import integrity
from ultramem_megatron.faults.manifest import MANIFEST


class Call:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def payload(mark: Path) -> Call:
    """Whoever unpickles it makes the file `mark`."""
    return Call(exec, f"open({str(mark)!r}, 'w').close()")


def torch_saved(value) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def replace_object(folder: Path, key: str, content: bytes) -> None:
    """Other bytes for the object in a shard whose key begins so; the rest stays as it is."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(i for i in metadata.storage_data if i.fqn.startswith(key))
    old = metadata.storage_data[index]
    shard = folder / old.relative_path
    new = dataclasses.replace(old, offset=shard.stat().st_size, length=len(content))
    metadata.storage_data[index] = new
    with shard.open("ab") as file:
        file.write(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _flags(**changes):
    def plant(folder: Path, mark: Path) -> None:
        from megatron.core import dist_checkpointing

        common = dist_checkpointing.load_common_state_dict(str(folder))
        for name, value in changes.items():
            setattr(common["args"], name, value)
        replace_object(folder, "common_state", torch_saved([common]))
        module = f"open({str(mark)!r}, 'w').close()"
        (mark.parent / "planted_module.py").write_text(module)

    return plant


def _object(key: str):
    return lambda folder, mark: replace_object(folder, key, torch_saved(payload(mark)))


def _pickled_extra_state(folder: Path, mark: Path) -> None:
    """As Transformer Engine has it: pickled, in a tensor of bytes."""
    import torch

    state = torch.frombuffer(bytearray(pickle.dumps(payload(mark))), dtype=torch.uint8)
    replace_object(folder, "decoder.layers", torch_saved([state]))


def _file(name: str, *, saved: bool = False):
    def plant(folder: Path, mark: Path) -> None:
        value = payload(mark)
        (folder / name).write_bytes(torch_saved(value) if saved else pickle.dumps(value))

    return plant


def _metadata_naming_a_module(folder: Path, mark: Path) -> None:
    (mark.parent / "torch_planted.py").write_text(f"open({str(mark)!r}, 'w').close()")
    (folder / ".metadata").write_bytes(b"\x80\x04\x8c\rtorch_planted\x8c\x01x\x93.")


KINDS = {
    "nothing": lambda folder, mark: None,
    "flags": _object("common_state"),
    "extra state": _object("decoder.layers"),
    "extra state pickled again": _pickled_extra_state,
    "random state": _object("rng_state"),
    "metadata": _file(".metadata"),
    "metadata naming a module": _metadata_naming_a_module,
    "common.pt": _file("common.pt", saved=True),
    "metadata.json": _file("metadata.json"),
    "integrity.json": _file(MANIFEST),
    "tracker": _file(f"../{integrity.TRACKER}"),
    "flag that names a module": _flags(spec=["planted_module", "x"]),
    "flag that names a quantizer": _flags(fp8_quantizer_factory="planted_module.x"),
}
"""What is planted -> how."""
TRUSTING = "flags that trust a tokenizer"
_TRUST = _flags(trust_remote_code=True, tokenizer_type="HuggingFaceTokenizer")


def planted(whole: Path, folder: Path, kind: str) -> Path:
    """A copy of the checkpoints in `whole`, the latest one planted, its sums mended.

    The payload makes folder/MARK. Returns the copy, which lies in `folder`, too.
    """
    copy = folder / "checkpoints"
    shutil.copytree(whole, copy)
    latest = integrity.iteration_folder(copy, (copy / integrity.TRACKER).read_text())
    run_on_ranks(1, _plant, latest, kind, folder / "MARK")
    manifest = latest / MANIFEST
    if kind != "integrity.json":
        sums = json.loads(manifest.read_text())
        files = (path for path in latest.iterdir() if path != manifest)
        sums["files"] = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
        manifest.write_text(json.dumps(sums))
    return copy


def _plant(latest: Path, kind: str, mark: Path) -> None:
    (_TRUST if kind == TRUSTING else KINDS[kind])(latest, mark)
