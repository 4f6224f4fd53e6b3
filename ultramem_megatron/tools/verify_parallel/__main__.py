"""Train one model in two parallel layouts and report the largest differences.

    ultramem verify --ranks 1 4 <common flags> \\
        -- <flags of the first layout> -- <flags of the second layout>

Both start from one checkpoint (made by one step of the first layout, weights and optimizer state)
and see the same data. Dropout is off, since what it drops depends on the layout, and nothing is
evaluated. Exit status 1 if a difference exceeds --tolerance.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultramem_megatron.errors import CommandParser, UltraMemError

_SHOWN_LINES = 30
_LAUNCHER_REPORTS = "torch/distributed/elastic/multiprocessing/api.py"
"""Where torchrun begins to say that a rank failed, in the log line of that file."""
_OVERRIDES = (
    "--attention-dropout",
    "0",
    "--hidden-dropout",
    "0",
    "--eval-iters",
    "0",
    "--eval-interval",
    "1",
)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[list[str]]]:
    """Our options, the common Megatron flags, and those of the two layouts."""
    parser = CommandParser(
        prog="ultramem verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs=2,
        required=True,
        metavar=("FIRST", "SECOND"),
        help="processes of the two layouts, on this machine",
    )
    parser.add_argument("--steps", type=int, default=3, help="steps to compare (default 3)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest relative difference accepted (default 1e-5)",
    )
    sets = _split(list(argv))
    if {"-h", "--help"} & set(sets[0]):
        parser.print_help()
        sys.exit(0)
    if len(sets) != 3:
        raise UltraMemError(
            f"Give the common flags, then -- and the flags of the first layout, then -- and those "
            f"of the second; found {len(sets) - 1} '--'. A layout may have no flags of its own."
        )
    options, common = parser.parse_known_args(sets[0])
    for name, value in (("--ranks", min(options.ranks)), ("--steps", options.steps)):
        if value < 1:
            raise UltraMemError(f"{name} has {value}; it must be at least 1.")
    taken = {"--train-iters", "--load", "--save", "--save-interval"} & {
        word.split("=")[0] for flags in sets for word in flags
    }
    if taken:
        raise UltraMemError(
            f"{', '.join(sorted(taken))}: set by this command itself; use --steps for the length."
        )
    if any("--use-megatron-fsdp" in flags for flags in sets[1:]):
        raise UltraMemError(
            "--use-megatron-fsdp: it reads checkpoints of its own format alone, so that the two "
            "layouts cannot start from one. Give it to both, with the common flags, or neither."
        )
    return options, [*common, *_OVERRIDES], sets[1:]


def _split(words: list[str]) -> list[list[str]]:
    sets: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            sets.append([])
        else:
            sets[-1].append(word)
    return sets


def launch(ranks: int, flags: Sequence[str], record_to: Path) -> None:
    """Train with `flags` on `ranks` processes of this machine, recording into a new folder."""
    import torch

    from ultramem_megatron.tools.verify_parallel.record import FOLDER

    record_to.mkdir()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "ultramem_megatron.tools.verify_parallel.record",
        *flags,
    ]
    environment = {**os.environ, FOLDER: str(record_to)}
    if not torch.cuda.is_available():
        environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        output = (done.stdout + done.stderr).splitlines()
        message = next((line for line in output if line.startswith("error: ")), None)
        shown = [message] if message else _last_words(done.stderr.splitlines())
        raise UltraMemError(f"training on {ranks} ranks failed:\n" + "\n".join(shown))


def _last_words(lines: list[str]) -> list[str]:
    """Of the ranks, before torchrun adds its own."""
    end = next((i for i, line in enumerate(lines) if _LAUNCHER_REPORTS in line), len(lines))
    return lines[:end][-_SHOWN_LINES:]


def main(argv: Sequence[str] | None = None) -> int:
    """Train both, print the differences; 0 if all are within the tolerance."""
    options, common, layouts = parse(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory(prefix="verify_parallel_") as name:
        first, second = _train_both(options, common, layouts, Path(name))
    from ultramem_megatron.tools.verify_parallel.compare import compare

    differences = compare(first, second)
    if any("--use-distributed-optimizer" in [*common, *layout] for layout in layouts):
        # Each rank then has its share of the reduced gradients only.
        differences = [d for d in differences if "gradients" not in d.kind]
    for kind, value, place in differences:
        print(f"{kind:>22}: {value:.2e}  ({place})")
    worst = max(difference.value for difference in differences)
    verdict = "agree" if worst <= options.tolerance else "DIFFER"
    print(f"layouts {verdict}: largest difference {worst:.2e}, tolerance {options.tolerance:.0e}")
    return 0 if worst <= options.tolerance else 1


def _train_both(
    options: argparse.Namespace, common: list[str], layouts: list[list[str]], folder: Path
) -> list[list[dict[str, Any]]]:
    from ultramem_megatron.tools.verify_parallel.compare import recorded

    checkpoint = folder / "start"
    file_format = "fsdp_dtensor" if "--use-megatron-fsdp" in common else "torch_dist"
    length = ["--train-iters", str(options.steps + 1), "--ckpt-format", file_format]
    print(f"making a start: one step on {options.ranks[0]} ranks", flush=True)
    save = ["--save", str(checkpoint), "--save-interval", "1", "--exit-interval", "1"]
    launch(options.ranks[0], [*common, *layouts[0], *length, *save], folder / "making")
    results = []
    for number, (ranks, layout) in enumerate(zip(options.ranks, layouts, strict=True), start=1):
        print(f"layout {number}: {options.steps} steps on {ranks} ranks", flush=True)
        load = ["--load", str(checkpoint), "--no-load-rng"]
        launch(ranks, [*common, *layout, *length, *load], folder / f"layout{number}")
        results.append(recorded(ranks, folder / f"layout{number}"))
    return results


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UltraMemError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
