"""Flags of plan --fit, and what it prints for them."""

import argparse
from collections.abc import Sequence
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.presets import find_preset
from ultramem_megatron.tools.quiet import quiet


def add_fit_flags(parser: argparse.ArgumentParser) -> None:
    """Of what the machine has; rates are an H100's where none are given."""
    group = parser.add_argument_group("--fit", "rates: an H100's by its data sheet, by default")
    add = group.add_argument
    add("--fit", action="store_true", help="layouts over --gpus N that fit --memory, fastest first")
    add("--memory", type=float, metavar="GB", help="of a GPU, 1e9 bytes, for what plan counts")
    add(
        "--bandwidth",
        type=float,
        nargs=2,
        metavar=("NODE", "NETWORK"),
        help="GB/s of a GPU to others in its node, and to other nodes (default: 350 45)",
    )
    add("--node-size", type=int, metavar="N", help="GPUs of a node (default: 8)")
    add("--tflops", type=float, metavar="T", help="peak of matrix products (default: 989)")
    add("--efficiency", type=float, metavar="E", help="share of it that is reached (default: 0.4)")
    add("--memory-bandwidth", type=float, metavar="GB/s", help="of a GPU (default: 3350)")
    add("--top", type=int, metavar="N", help="layouts to show (default: 10)")


_DEFAULTS: dict[str, Any] = {
    "bandwidth": (350.0, 45.0),
    "node_size": 8,
    "tflops": 989.0,
    "efficiency": 0.4,
    "memory_bandwidth": 3350.0,
    "top": 10,
}
_OWN = ("memory", *_DEFAULTS)


def refuse_without_fit(options: argparse.Namespace) -> None:
    """Raise UltraMemError for a flag of --fit that stands alone."""
    for name in _OWN:
        if getattr(options, name) is not None:
            raise UltraMemError(f"{_flag(name)} is a flag of plan --fit. Add --fit, or drop it.")


def fit_text(preset: str | None, flags: Sequence[str], options: argparse.Namespace) -> str:
    """The table, and the flags of the best. Raises UltraMemError if nothing fits."""
    for name, default in _DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    _check(options)
    if preset is not None:
        find_preset(preset)
    with quiet():
        from ultramem_megatron.tools.plan.fit_report import found_and_shown

        return found_and_shown(preset, flags, options)


def _check(options: argparse.Namespace) -> None:
    if options.json:
        raise UltraMemError("--json does not know --fit. Drop one of the two.")
    if options.gpus is None or len(options.gpus) != 1:
        given = "none" if options.gpus is None else " ".join(map(str, options.gpus))
        raise UltraMemError(f"--fit needs one number of GPUs: --gpus N ({given} given).")
    if options.memory is None:
        raise UltraMemError("--fit needs the memory of a GPU: --memory GB, e.g. --memory 80.")
    for name in _OWN:
        value = getattr(options, name)
        numbers = value if isinstance(value, Sequence) else [value]
        if not all(0 < number < float("inf") for number in numbers):
            shown = " ".join(f"{number:g}" for number in numbers)
            raise UltraMemError(f"{_flag(name)} is {shown}; it must be above 0.")
    if options.efficiency > 1:
        raise UltraMemError(f"--efficiency is {options.efficiency:g}; it is a share, at most 1.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
