"""Checkpoints are data, unless the user says of them that they may hold more."""

import os
import re

TRUST = "ULTRAMEM_TRUST_CHECKPOINTS"
ADVICE = (
    f"Nothing of it was run. Load checkpoints of a known origin; for one of your own that needs "
    f"this, set {TRUST}=1: it may then run any code."
)
"""Ends every message about something in a checkpoint that could run code."""


def is_trusted() -> bool:
    """Whether the user lets checkpoints name code: for files of their own making."""
    return os.environ.get(TRUST) == "1"


def fault_of(error: Exception) -> str:
    """What a safe unpickler found wrong with an object, in a few words."""
    named = re.search(r"(?:GLOBAL |disallowed class ')([^\s']+)", str(error))
    return f"asks for {named[1]}" if named else "is damaged, or no plain data"
