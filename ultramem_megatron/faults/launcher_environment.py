"""What a launcher tells a rank through its environment: all of it, or nothing."""

import os

from ultramem_megatron.errors import UltraMemError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def check_launcher_environment() -> None:
    """Raise UltraMemError for half a launcher's environment: it would wait for ranks for ever.

    None of its variables, or an address alone, is a process started by itself.
    """
    given = [name for name in _RANKS if name in os.environ]
    missing = [name for name in _NEEDED if name not in os.environ]
    if not given:
        return
    if missing:
        shown = ", ".join(f"{name}={os.environ[name]}" for name in given)
        raise UltraMemError(
            f"{shown} in the environment, but not {', '.join(missing)}: half of what a launcher "
            f"sets. Start with torchrun or launch/torchrun.sh, or for one process: "
            f"unset {' '.join(given)}."
        )
    for name in given:
        if not os.environ[name].isdecimal():
            raise UltraMemError(f"{name}={os.environ[name]} in the environment is no number.")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= size:
        raise UltraMemError(
            f"RANK={rank} in the environment, but WORLD_SIZE={size}: 0 to {size - 1}."
        )
