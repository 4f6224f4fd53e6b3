"""A PlainGPT on disk: config.json and model.safetensors, read without running any code in them."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.results_folder import results_folder, written_whole
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import parse_spans
from ultramem_megatron.tools.export.described import check_described
from ultramem_megatron.tools.export.plain_model import PlainConfig, PlainGPT

FORMAT = "ultramem_megatron plain GPT, version 1"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def refuse_written(folder: Path) -> None:
    """Raise UltraMemError for a folder that has either file: nothing is overwritten."""
    for name in (_CONFIG, _WEIGHTS):
        if os.path.lexists(folder / name):
            raise UltraMemError(f"{folder} holds {name} already. Choose another folder.")


def save_plain(model: PlainGPT, folder: str | Path, notes: dict[str, Any] | None = None) -> None:
    """Write both files. notes: anything that JSON holds, kept under "notes" (tokenizer, ...)."""
    folder = Path(folder)
    refuse_written(folder)
    results_folder(folder)
    fields = dataclasses.asdict(model.config)
    if model.config.ultramem is not None:
        fields["ultramem"]["spans"] = "/".join(map(str, model.config.ultramem.spans))
    content = {"format": FORMAT, "model": fields, "notes": notes or {}}
    with written_whole(folder):
        save_file(_stored(model), folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def load_plain(folder: str | Path, device: str | torch.device = "cpu") -> PlainGPT:
    """The model in evaluation mode, in the dtype it was saved in.

    Raises UltraMemError, naming the file, where one is missing, damaged, or not what it should be.
    """
    folder = Path(folder)
    config, _ = read_config(folder)
    with torch.device("meta"):
        model = PlainGPT(config)
    try:
        tensors = load_file(folder / _WEIGHTS, device=str(device))
    except (SafetensorError, OSError) as error:
        raise UltraMemError(
            f"{folder / _WEIGHTS} cannot be read: {error}. Copy or export the model again."
        ) from error
    _check_tensors(folder / _WEIGHTS, tensors, _stored(model))
    model.load_state_dict(tensors, assign=True, strict=False)  # shared tables come once
    return model.eval()


def read_config(folder: str | Path) -> tuple[PlainConfig, dict[str, Any]]:
    """What the model is, and the notes. Raises UltraMemError naming the file."""
    file = Path(folder) / _CONFIG
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UltraMemError(
            f"{file} cannot be read: {error}. Give a folder that ultramem export wrote."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UltraMemError(f"{file} is not of the format {FORMAT!r}.")
    try:
        config = _config_from(content["model"])
        check_described(config)
        return config, content["notes"]
    except (UltraMemError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UltraMemError(f"{file} does not describe a model: {error}") from error


def _config_from(fields: dict[str, Any]) -> PlainConfig:
    ultramem = fields["ultramem"]
    if ultramem is not None:
        spans = parse_spans(ultramem["spans"], fields["num_layers"])
        ultramem = UltraMemConfig(**{**ultramem, "spans": spans})
    return PlainConfig(**{**fields, "ultramem": ultramem})


def _stored(model: PlainGPT) -> dict[str, Tensor]:
    """The model's tensors; those that several memories share, by their first reader's name."""
    by_tensor = {id(t): (n, t) for n, t in reversed(model.state_dict(keep_vars=True).items())}
    return {name: tensor.detach() for name, tensor in reversed(by_tensor.values())}


def _check_tensors(file: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not expected" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UltraMemError(
            f"{file} does not fit {_CONFIG}: {'; '.join(sorted(problems)[:3])}{more}."
        )
