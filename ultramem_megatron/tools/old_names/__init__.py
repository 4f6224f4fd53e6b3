"""Names that modules had up to 0.1, kept for one release: this folder is on the package's path.

A file here stands for the module of its name: run with -m it is the command, imported it is the
module at its new place. `convert` alone is a name that stays.
"""

import importlib
import os
import sys
import warnings

from ultramem_megatron.__main__ import main


def stand_in(name: str, module: str, command: str | None = None) -> None:
    """Be what the file was; `name` is its `__name__`. Says the new name once, on rank 0.

    module: where it is now, below `ultramem_megatron`. command: the word after `ultramem`.
    """
    if name == "__main__":
        if os.environ.get("RANK", "0") == "0":
            print(
                f"This command is now `python -m ultramem_megatron {command}`; its old name works "
                f"until the next release.",
                file=sys.stderr,
                flush=True,
            )
        sys.exit(main([*str(command).split(), *sys.argv[1:]]))
    new = f"ultramem_megatron.{module}"
    warnings.warn(
        f"{name} is now {new}; its old name works until the next release.",
        FutureWarning,
        stacklevel=4,
    )
    sys.modules[name] = importlib.import_module(new)
