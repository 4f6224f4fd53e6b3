"""What Megatron and torch say at every start, and nobody can act upon, is held back."""

import logging
import os
import re
import warnings

SHOW = "ULTRAMEM_SHOW_UPSTREAM_WARNINGS"
"""Environment: 1 shows all."""

_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "Only transformer-engine>=",
    "'pin_memory' argument is set as true but no accelerator is found",
    ".*_set_pg_timeout` is deprecated",
    "MimoModelConfig is experimental",
    r"The following imports from `dynamic_context\.py`",
)
"""How they begin: what is not installed here, and what upstream will change in its own code."""
_LOGGED = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.rerun_state_machine": "(RerunStateMachine initialized|Setting RerunStateMachine "
    "mode|Result validation enabled)",
    "megatron.core.datasets.gpt_dataset": "Unable to save MockGPTDataset indexes",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}
"""Logger -> how its records begin."""


def hold_back_upstream_noise() -> None:
    """From now on, and in this process; a second call changes nothing. Errors are never held back.

    Environment: ULTRAMEM_SHOW_UPSTREAM_WARNINGS=1 shows all.
    """
    if os.environ.get(SHOW) == "1":
        return
    for beginning in _WARNINGS:
        warnings.filterwarnings("ignore", message=beginning)
    for name, beginning in _LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Beginning) for known in logger.filters):
            logger.addFilter(_Beginning(beginning))


class _Beginning(logging.Filter):
    """Lets all pass but records below errors that begin so."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.pattern = re.compile(beginning)

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or not self.pattern.match(record.getMessage())
