"""The settings in force, in one block: what flags, preset and defaults came to, and whose code."""

import dataclasses
import os
import platform
import subprocess
import textwrap
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_wandb_writer

from ultramem_megatron.megatron.flags.table_flags import settings_from_args
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.tables.settings import TableSettings
from ultramem_megatron.patches import registry

_WIDTH, _LABEL = 100, 22
_CONTINUED = " " * 6
_ROOT = Path(__file__).resolve().parents[2]
_RUN_FLAGS = (
    "table_memory",
    "overlap",
    "upcycle",
    "train_only",
    "train_rows",
    "background_reads",
    "log_tables_interval",
)


def log_settings(args: Namespace, config: Any) -> None:
    """Print the block on rank 0, and let it into TensorBoard, W&B and the checkpoint.

    Those are written by the first and the last rank, from Megatron's flags: there it is the entry
    `ultramem_in_force`. config: the UltraMemGPTModelConfig that the flags made.
    """
    rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
    if rank not in (0, last):
        return
    ultramem = config.ultramem
    tables = TableSettings() if ultramem is None else settings_from_args(args, ultramem)
    args.ultramem_in_force = found = settings_in_force(args, ultramem, tables)
    if rank == 0:
        print(block(found), flush=True)
    wandb = get_wandb_writer()
    if wandb:
        wandb.config.update({"ultramem_in_force": found})


def settings_in_force(
    args: Namespace, ultramem: UltraMemConfig | None, tables: TableSettings
) -> dict[str, str]:
    """By name, as they are logged. `ultramem` and `tables` as the model is built with them."""
    found: dict[str, str] = {"preset": args.ultramem_preset or "none"}
    if ultramem is None:
        found["memory layers"] = "none: a plain GPT"
    else:
        for field in dataclasses.fields(ultramem):
            found[field.name] = _shown(getattr(ultramem, field.name))
        found["tables"] = cut_of(tables)
        for name in _RUN_FLAGS:
            found[name] = _shown(getattr(args, f"ultramem_{name}"))
    names = ("ultramem-megatron", "megatron-core", "numpy")
    known = {name: version(name) for name in names}
    known |= {"torch": torch.__version__, "Python": platform.python_version()}
    found["versions"] = ", ".join(f"{name} {number}" for name, number in known.items())
    found["commit"] = commit()
    found["patches"] = _by_folder(registry.applied()) or "none"
    return found


def _by_folder(patches: Sequence[str]) -> str:
    """ "cpu: devices, rng_state; defects: ..." of names such as cpu.devices."""
    folders: dict[str, list[str]] = {}
    for patch in patches:
        folder, _, name = patch.partition(".")
        folders.setdefault(folder, []).append(name)
    return "; ".join(f"{folder}: {', '.join(names)}" for folder, names in folders.items())


def cut_of(tables: TableSettings) -> str:
    """How tables lie on ranks, in words; checkpoints keep them."""
    if tables.size == 1:
        return "whole"
    nodes = f", {tables.node} in a node" if tables.partition == "grid" else ""
    return f"over {tables.size} ranks, {tables.partition}-wise{nodes}"


def block(found: Mapping[str, str]) -> str:
    """Several lines for the log: short values two a line, long ones wrapped."""
    lines = [" UltraMem, settings in force ".center(_WIDTH, "-")]
    waiting = ""
    for name, value in found.items():
        cell = f"  {name:<{_LABEL}}{value or 'none'}"
        if len(cell) >= _WIDTH // 2:
            lines += filter(None, [waiting])
            lines += textwrap.wrap(
                cell, _WIDTH, subsequent_indent=_CONTINUED, break_long_words=False
            )
            waiting = ""
        elif waiting:
            lines.append(f"{waiting:<{_WIDTH // 2}}{cell}")
            waiting = ""
        else:
            waiting = cell
    return "\n".join([*lines, *filter(None, [waiting]), "-" * _WIDTH])


def commit() -> str:
    """Of the checkout that runs, with -dirty where files differ from it; or why there is none."""
    if not (_ROOT / ".git").exists():
        return "none: not a checkout"
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown: git does not say"
    return done.stdout.strip()


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "yes" if value else "no"
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
