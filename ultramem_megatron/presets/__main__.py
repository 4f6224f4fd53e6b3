"""List presets, explain one, or print its flags on one line for a shell script to splice."""

import argparse
import shlex
from collections.abc import Sequence

from ultramem_megatron.errors import CommandParser, exit_on_user_error
from ultramem_megatron.presets import PRESETS, find_preset
from ultramem_megatron.presets.flags import flags
from ultramem_megatron.presets.preset import SOURCES, Preset, Settings


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="ultramem presets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="a preset; without one, all are listed")
    add("--model", action="store_true", help="print the model's flags: transformer and memory")
    add("--training", action="store_true", help="print the training's flags")
    return parser


def _listing() -> str:
    width = max(map(len, PRESETS))
    return "\n".join(f"{name:<{width}}  {preset.about}" for name, preset in PRESETS.items())


def _explanation(name: str, preset: Preset) -> str:
    parts: tuple[tuple[str, Settings, str], ...] = (
        ("model", preset.model, "--"),
        ("memory", preset.memory, "--ultramem-"),
        ("training", preset.training, "--"),
    )
    lines = [f"{name}: {preset.about}"]
    for title, settings, prefix in parts:
        if settings:
            lines += ["", title, *(_line(name, settings, prefix) for name in settings)]
    lines += ["", *(f"{source:<9} {meaning}" for source, meaning in SOURCES.items())]
    return "\n".join(lines)


def _line(name: str, settings: Settings, prefix: str) -> str:
    value, source = settings[name]
    flag = prefix + name.replace("_", "-")
    if isinstance(value, bool):
        shown = flag if value else flag.replace("--", "--no-", 1)
    else:
        shown = f"{flag} {value}"
    return f"  {source:<9} {shown}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print what was asked for. Raises UltraMemError for an unknown name."""
    options = _parser().parse_args(argv)
    if options.name is None:
        print(_listing())
    elif options.model or options.training:
        print(shlex.join(flags(options.name, model=options.model, training=options.training)))
    else:
        print(_explanation(options.name, find_preset(options.name)))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
