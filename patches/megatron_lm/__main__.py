"""`ultramem patches megatron-lm --check PATH`: which patch fits a checkout.

The patches here are for people who keep a fork of Megatron-LM: one per version, a few lines in
pretrain_gpt.py, to be applied with `git apply`. They change no other file.
"""

import shlex
import subprocess
from pathlib import Path

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error

_SCRIPT = "pretrain_gpt.py"


def patch_files() -> list[Path]:
    """Our patches, named after the versions of Megatron-LM that they are for."""
    return sorted(Path(__file__).parent.glob("*.patch"))


def fitting_patch(checkout: Path) -> Path:
    """The patch that `git apply` accepts for `checkout`; raises UltraMemError if there is none."""
    if not (checkout / _SCRIPT).is_file():
        raise UltraMemError(f"{checkout}: no {_SCRIPT} there. Give a checkout of Megatron-LM.")
    reasons = []
    for patch in patch_files():
        # One line of context: forks differ around the lines that matter.
        command = ["git", "apply", "--check", "-C1", str(patch)]
        tried = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
        if tried.returncode == 0:
            return patch
        reasons.append(f"{patch.name}: {' '.join(tried.stderr.split())}")
    raise UltraMemError(
        f"{checkout}: no patch applies ({'; '.join(reasons)}). Make the changes of the nearest one "
        f"by hand, or run the script unedited with ultramem run."
    )


def main() -> None:
    """Print the command that applies the fitting patch; exit with status 2 if none fits."""
    parser = CommandParser(prog="ultramem patches megatron-lm")
    parser.add_argument("--check", metavar="PATH", type=Path, required=True, help="a checkout")
    checkout = parser.parse_args().check.resolve()
    patch = fitting_patch(checkout)
    command = ["git", "-C", str(checkout), "apply", "-C1", str(patch.resolve())]
    print(f"{patch.stem} applies: {shlex.join(command)}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
