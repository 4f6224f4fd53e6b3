"""`--help` is printed, whatever stands in the help texts of Megatron's flags."""

from argparse import ArgumentParser, HelpFormatter
from collections.abc import Callable

from ultramem_megatron.patches.patch import Editor, Patch


def _legible(add: Callable[[ArgumentParser], ArgumentParser]) -> Callable[..., ArgumentParser]:
    def add_megatron_arguments(parser: ArgumentParser) -> ArgumentParser:
        parser = add(parser)
        formatter = HelpFormatter(parser.prog)
        for action in parser._actions:
            try:
                formatter._expand_help(action)
            except (KeyError, TypeError, ValueError):
                action.help = (action.help or "").replace("%", "%%")
        return parser

    return add_megatron_arguments


def _install(editor: Editor) -> None:
    editor.wrap(
        "megatron.training.arguments.add_megatron_arguments", _legible, parameters=("parser",)
    )


PATCH = Patch(
    name="defects.help_text",
    symbols=("megatron.training.arguments.add_megatron_arguments",),
    reason="A help text has a lone '%', which argparse takes for a format: --help is a traceback.",
    delete_when="--moe-paged-stash-buffer-size-factor-cuda says '10%%'.",
    install=_install,
    versions=">=0.19,<0.20",
)
