"""Values that several memories read: how many, from which row on (UltraMemV2, arXiv 2508.18756).

L memories of n*n values each; a memory reads a window of g*n*n, rounded down to a square. In
Memory+ (arXiv 2412.09764) all read the same n*n.
"""

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig, flag

_GROUPS = ("block", "same")
"""Orders in which g neighbours have a table, and others another one."""


def first_value(config: UltraMemConfig, memory: int) -> int:
    """Row of its table at which the window of a memory (counted from 0) begins."""
    if config.share_order in _GROUPS:
        return 0
    last = len(config.spans) if config.share_order == "ring" else _last_start(config)
    return min(memory, last) * config.num_keys**2


def owner(config: UltraMemConfig, memory: int) -> int:
    """The memory (counted from 0) after which the values of this one are named."""
    if config.share_order not in _GROUPS:
        return 0
    together = round(config.share_values)
    return memory // together * together


def check_sharing(config: UltraMemConfig) -> None:
    """Raise UltraMemError for memories that cannot share their values so."""
    together, memories = config.share_values, len(config.spans)
    if not 0 < together <= memories:
        raise UltraMemError(
            f"{flag('share_values')} is {together:g}; it must be from 1 to {memories}, the number "
            f"of memories."
        )
    if config.share_order in _GROUPS and (together % 1 or memories % together):
        fitting = [str(g) for g in range(1, memories + 1) if memories % g == 0]
        raise UltraMemError(
            f"{flag('share_values')} {together:g} with {flag('share_order')} "
            f"{config.share_order} needs whole groups of the {memories} memories: use one of "
            f"{', '.join(fitting)}, or another order."
        )
    if config.share_order == "noring" and together % 1:
        raise UltraMemError(
            f"{flag('share_values')} is {together:g}; with {flag('share_order')} noring it must be "
            f"a whole number."
        )


def _last_start(config: UltraMemConfig) -> int:
    return len(config.spans) - round(config.share_values)
