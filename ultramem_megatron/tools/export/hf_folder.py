"""A model in the folder that transformers opens, and read back without running what is in it."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.results_folder import written_whole
from ultramem_megatron.tools.export import hf
from ultramem_megatron.tools.export.described import check_described
from ultramem_megatron.tools.export.hf.configuration_ultramem import UltraMemGPTConfig
from ultramem_megatron.tools.export.hf.modeling_ultramem import UltraMemGPTForCausalLM
from ultramem_megatron.tools.export.hf_tokenizer import HFTokenizer, has_tokenizer
from ultramem_megatron.tools.export.huggingface import (
    check_tensors,
    hf_config,
    hf_state,
    plain_config,
    plain_state,
)
from ultramem_megatron.tools.export.megatron import check_same
from ultramem_megatron.tools.export.plain_model import PlainGPT

SHARD = "5GB"
"""Largest file of weights."""
SUMS = "SHA256SUMS"
_TRAINED_WITH = "megatron_tokenizer"
_NOT_A_MODEL = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""What transformers, and a configuration's own arithmetic, raise for settings of other kinds."""
_AUTO_MAP = {
    "AutoConfig": "configuration_ultramem.UltraMemGPTConfig",
    "AutoModel": "modeling_ultramem.UltraMemGPTModel",
    "AutoModelForCausalLM": "modeling_ultramem.UltraMemGPTForCausalLM",
}


def refuse_full(folder: str | Path) -> None:
    """Raise UltraMemError unless the folder is new or empty: nothing in it is overwritten."""
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise UltraMemError(f"{folder} is no folder. Choose another one.")
    held = next(iter(sorted(folder.iterdir())), None) if folder.is_dir() else None
    if held is not None:
        raise UltraMemError(f"{folder} holds {held.name} already. Choose another folder.")


def save_hf(
    plain: PlainGPT, folder: str | Path, tokenizer: HFTokenizer, card: str, *, shard: str = SHARD
) -> None:
    """Write what `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` reads.

    card: the text of README.md. Logits are compared first. Raises UltraMemError.
    """
    refuse_full(folder)
    folder = Path(folder)
    model = hf_model(plain)
    tokenizer.configure(model)
    model.config.auto_map = _AUTO_MAP
    setattr(model.config, _TRAINED_WITH, tokenizer.flags)
    with written_whole(folder):
        model.save_pretrained(folder, max_shard_size=shard)
        tokenizer.save(folder)
        copy_sources(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        finish(folder)


def copy_sources(folder: Path) -> None:
    """The model's own files, as an export has them."""
    for name in hf.SOURCES:
        shutil.copyfile(Path(hf.__file__).parent / name, folder / name)


def hf_model(plain: PlainGPT) -> UltraMemGPTForCausalLM:
    """The same model for transformers, on the same tensors where they need not be cut."""
    problem = "Export without hf: the model for transformers has not the tensors of this one"
    model = with_weights(hf_config(plain.config), hf_state(plain), problem)
    check_same(plain, lambda tokens: model(tokens).logits, "those of the model for transformers")
    return model


def with_weights(
    config: UltraMemGPTConfig, state: dict[str, Tensor], problem: str
) -> UltraMemGPTForCausalLM:
    """The model of these tensors, which it keeps.

    Raises UltraMemError where it has others: `problem`, and their names.
    """
    with torch.device("meta"):
        model = UltraMemGPTForCausalLM(config)
    tied = model.all_tied_weights_keys
    wanted = model.state_dict().items()
    try:
        check_tensors(state, {name: t for name, t in wanted if name in state or name not in tied})
    except UltraMemError as error:
        raise UltraMemError(f"{problem}: {error}") from None
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    return model.eval()


def load_hf(folder: str | Path, device: str = "cpu") -> tuple[PlainGPT, dict[str, Any]]:
    """The model of such a folder, and the flags of the tokenizer it was trained with.

    Whatever wrote it, transformers after more training, too; its .py files are left alone. Raises
    UltraMemError, naming the file, where something is missing, damaged or not what it should be.
    """
    folder = Path(folder)
    content, config = read_config(folder)
    check_sums(folder)
    plain_fields = plain_config(config)
    state = read_weights(folder, device)
    try:
        joined = plain_state(plain_fields, state)
    except UltraMemError as error:
        raise UltraMemError(f"The weights in {folder} do not fit config.json: {error}") from None
    with torch.device("meta"):
        plain = PlainGPT(plain_fields)
    plain.load_state_dict(joined, assign=True)
    return plain.eval(), _tokenizer_flags(folder, content)


def read_config(
    folder: Path, *, quantized: bool = False
) -> tuple[dict[str, Any], UltraMemGPTConfig]:
    """config.json as it stands, and what it says of the model. Raises UltraMemError.

    quantized: value tables may be in 8 bits.
    """
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UltraMemError(
            f"{file} cannot be read: {error}. Give a folder that ultramem export --to hf wrote."
        ) from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != UltraMemGPTConfig.model_type:
        raise UltraMemError(
            f"{file}: its model_type is {kind!r:.80}, not {UltraMemGPTConfig.model_type!r}. Give a "
            f"folder that ultramem export --to hf wrote."
        )
    if content.get("value_quantization") and not quantized:
        raise UltraMemError(
            f"{folder}: its value tables are quantized, which cannot be undone. Give the folder "
            f"that it was made from."
        )
    try:
        config = UltraMemGPTConfig.from_dict(content)
        if not isinstance(config.dtype, torch.dtype | None):
            raise TypeError(f"dtype is {config.dtype!r:.80}, no type of numbers.")
        check_described(dataclasses.replace(plain_config(config), dtype="float32"))
    except (UltraMemError, *_NOT_A_MODEL) as error:
        raise UltraMemError(f"{file} does not describe a model: {error}") from error
    return content, config


def read_weights(folder: Path, device: str) -> dict[str, Tensor]:
    """All tensors by transformers' names. Raises UltraMemError."""
    index = folder / "model.safetensors.index.json"
    names: Iterable[str] = ["model.safetensors"]
    try:
        if index.exists():
            names = sorted({*map(os.fspath, json.loads(index.read_text())["weight_map"].values())})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UltraMemError(f"{index} cannot be read: {error}. Copy the folder again.") from error
    state: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise UltraMemError(f"{index} names {name!r:.200}, which is not in its folder.")
        try:
            state |= load_file(folder / name, device=device)
        except (SafetensorError, OSError) as error:
            raise UltraMemError(
                f"{folder / name} cannot be read: {error}. Copy or export the model again."
            ) from error
    return state


def _tokenizer_flags(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Megatron's flags of the folder's own tokenizer, or of the one the model was trained with."""
    if has_tokenizer(folder):
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder)}
    kept = content.get(_TRAINED_WITH)
    flags = kept if isinstance(kept, dict) else {}
    return {name: flags.get(name) for name in ("tokenizer_type", "tokenizer_model")}


def finish(folder: Path) -> None:
    """The sums of all files; and the modes that the user's umask gives, which some writers skip."""
    umask = os.umask(0)
    os.umask(umask)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_sum(path)}  {path.relative_to(folder)}\n" for path in files]
    (folder / SUMS).write_text("".join(lines))
    for path in files:
        path.chmod(0o666 & ~umask)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sums(folder: Path) -> None:
    """Raise UltraMemError for weights that are not as they were written, where their sums are."""
    try:
        lines = (folder / SUMS).read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        wanted, _, name = line.partition("  ")
        file = folder / name
        if name.endswith(".safetensors") and file.is_file() and _sum(file) != wanted:
            raise UltraMemError(
                f"{file} is not as {SUMS} says: damaged, or written since. Copy it again, or "
                f"remove {SUMS} if that was meant."
            )
