"""Weights with NaN or infinity are refused where they are loaded, not found in a later loss."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ultramem_megatron.errors import NonFiniteError

_ADVICE = "load an earlier one (--load with --ckpt-step)"


def refuse_non_finite(
    named: Iterable[tuple[str, Tensor]], owner: str, advice: str = _ADVICE
) -> None:
    """Raise NonFiniteError for the first tensor that is not finite.

    owner: whose, in the message. advice: what its reader can do. Of a DTensor this rank's shard is
    searched.
    """
    for name, given in named:
        weight: Tensor = given.to_local() if hasattr(given, "to_local") else given
        # The sum needs no memory of the weight's size; where it overflows, the numbers decide.
        if weight.is_meta or bool(torch.isfinite(weight.sum(dtype=torch.float32))):
            continue
        rows = weight.flatten(1) if weight.dim() > 1 else weight.reshape(-1, 1)
        bad = int((~torch.isfinite(rows)).any(dim=1).sum())
        if bad:
            unit = "rows" if weight.dim() > 1 else "numbers"
            raise NonFiniteError(
                f"The loaded {name} of {owner} holds NaN or infinity in {bad} of its {len(rows)} "
                f"{unit}. The checkpoint is damaged or the run that wrote it had diverged: "
                f"{advice}."
            )


@contextmanager
def naming_where(checkpoint: str) -> Iterator[None]:
    """Put the checkpoint before a NonFiniteError that leaves the block."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{checkpoint}: {error}") from None
