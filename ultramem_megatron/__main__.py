"""Every command of this package: `ultramem COMMAND`, or `python -m ultramem_megatron COMMAND`.

ultramem                                    lists the commands
ultramem plan ultramem-1.6b-x12             runs one
torchrun ... -m ultramem_megatron train     the same on every rank
"""

import importlib
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ultramem_megatron import __version__
from ultramem_megatron.errors import UltraMemError, exit_on_user_error


class Command(NamedTuple):
    """Where a command's `main()` is, and what it does in a line."""

    module: str
    about: str


_PACKAGE = "ultramem_megatron"
_HELP = ("-h", "--help", "help")
_NOBODY_READS = 141  # as a shell shows a process that SIGPIPE ended
COMMANDS = {
    "train": Command("training.pretrain", "train a GPT with memory layers, by Megatron's flags"),
    "run": Command("training.run_script", "run Megatron-LM's own pretrain_gpt.py with memories"),
    "generate": Command("inference.generate", "continue prompts from a checkpoint"),
    "evaluate": Command("tools.evaluate.__main__", "perplexity of data, tasks of lm-eval"),
    "count": Command("tools.count", "reads of each value in ordinary text, for fine-tuning"),
    "inspect": Command("tools.inspect.__main__", "which values fire for which tokens"),
    "export": Command("tools.export.__main__", "a checkpoint as plain safetensors, and back"),
    "quantize": Command("tools.quantize", "value tables of a Hugging Face folder in 8 bits"),
    "edit": Command("tools.edit.__main__", "which values a fact is read from; switch them off"),
    "presets": Command("presets.__main__", "models of the paper as flags"),
    "flags": Command("megatron.flags.listing", "the --ultramem-* flags, with the values in force"),
    "check": Command("tools.check", "would these flags train? on a login node, without a GPU"),
    "plan": Command("tools.plan.__main__", "sizes, memory and traffic of a layout, before it runs"),
    "paper": Command("tools.paper.__main__", "the paper's tables, figures 1c and 9, beside ours"),
    "traffic": Command("tools.traffic", "bytes that each partition of a table moves"),
    "verify": Command("tools.verify_parallel.__main__", "do two layouts train the same model?"),
    "bench": Command("tools.bench", "the benchmarks of a checkout: kernels, training, decoding"),
    "gpu-report": Command("tools.gpu_report", "a checkout on a GPU: what is right, how fast"),
    "integrity": Command("faults.integrity", "which checkpoints of a folder are whole"),
    "data prepare": Command("data.prepare", "text to tokenizer and Megatron's datasets"),
    "data corpora": Command("data.corpora", "public texts to try things on"),
    "patches": Command("patches.__main__", "what is changed in Megatron at run time, and why"),
    "patches megatron-lm": Command("patches.megatron_lm.__main__", "the patch for a fork of yours"),
}
"""By the words that call it."""


def listing(first: str = "") -> str:
    """A line for each command, or for those that begin with the word `first`."""
    names = [name for name in COMMANDS if not first or name.split()[0] == first]
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {COMMANDS[name].about}" for name in names]
    return "\n".join(["usage: ultramem COMMAND ...   (ultramem COMMAND --help says more)", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (None: the command line) begins with; the exit status.

    A wrong command, flag or size ends the process with status 2 and one message.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with exit_on_user_error(), _reader_may_leave():
        told = _told(words)
        if told is not None:
            print(told)
            return 0
        name, rest = _split(words)
        # What a command's own parser shows as usage, and where Megatron looks for its flags.
        sys.argv = [f"ultramem {name}", *rest]
        command = importlib.import_module(f"{_PACKAGE}.{COMMANDS[name].module}")
        return command.main() or 0
    return 0


def _told(words: Sequence[str]) -> str | None:
    """What is said without a command: the listing, the version; None where there is one to run."""
    if not words or words[0] in _HELP:
        return listing()
    if words[0] == "--version":
        return f"ultramem_megatron {__version__}"
    several = words[0] not in COMMANDS and any(name.startswith(f"{words[0]} ") for name in COMMANDS)
    return listing(words[0]) if several and words[1:] and words[1] in _HELP else None


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """End quietly when nobody reads on: `ultramem flags | head`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout, 0)
        if not poll.poll(0):  # it is another pipe that broke, a training's for example
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
        sys.exit(_NOBODY_READS)


def _split(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            return name, words[count:]
    first = words[0]
    near = [name for name in COMMANDS if name.split()[0] == first]
    given = " ".join(words[: 2 if near else 1])
    raise UltraMemError(f"'{given}' is no command. There are: {', '.join(near or COMMANDS)}.")


if __name__ == "__main__":
    sys.exit(main())
