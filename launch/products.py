"""What a quickstart makes in its folder, and what of it the next one may remove."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultramem_megatron.data.own_folder import entries, remove
from ultramem_megatron.errors import UltraMemError

SETTINGS = "settings.json"  # what the checkpoints belong to, and the files that stages have made
PRODUCTS = ("checkpoints", "tensorboard", "logs", "loss.png", "sample.txt", "summary.json")


def read_settings(file: Path) -> dict[str, Any]:
    """What an earlier run has written; no more than an empty list of files where there was none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"made": []}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UltraMemError(f"{file}: is not a quickstart's. Move it away.")
    return {"made": [], **content}


def remove_products(folder: Path, made: Sequence[str]) -> None:
    """Removes what stages of an earlier run have made; refuses to start beside anything else."""
    found = entries(folder, PRODUCTS)
    if others := sorted(found - set(made)):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UltraMemError(
            f"--output {folder}: {others[0]}{more} is in the way, and in no list of what an "
            "earlier run made: that run was killed, or it is yours. Finish the run with "
            "--continue, move the files away, or give another folder."
        )
    remove(folder, found)
