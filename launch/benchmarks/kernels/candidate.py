"""One of several ways to do the same thing, and how far two of them agree."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.dispatch import VARIABLE
from ultramem_megatron.kernels.native.library import native_library


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A step to time; `forward` is called anew for each.

    The backward pass starts from the output itself, as if the loss were half its square.
    """

    name: str
    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    """Tensors that get a gradient; cleared after each step."""
    gradients: Callable[[], dict[str, Tensor]] | None = None
    """What must agree with the first candidate's; None if it computes another thing."""
    kernels: str = ""
    """Implementation to force, see dispatch.py."""
    canonical: Callable[[Tensor], Tensor] = field(default=lambda output: output)
    """The output in a form that does not depend on the order of equals."""

    @torch.no_grad()
    def inference(self) -> None:
        """A forward pass."""
        self.forced(self.forward)

    def training(self) -> None:
        """A forward and a backward pass."""
        output = self.forced(self.forward)
        self.forced(lambda: output.backward(output.detach()))
        self.clear()

    def backward_of(self, output: Tensor) -> None:
        """The backward pass alone."""
        self.forced(lambda: output.backward(output.detach()))

    def clear(self) -> None:
        """Forget gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def results(self) -> dict[str, Tensor]:
        """Output and gradients, to be compared."""
        assert self.gradients is not None
        for leaf in self.leaves:
            if hasattr(leaf, "main_grad"):
                leaf.main_grad.zero_()
        output = self.forced(self.forward)
        self.forced(lambda: output.backward(output.detach()))
        found = {"output": self.canonical(output.detach()), **self.gradients()}
        self.clear()
        return {name: tensor.clone() for name, tensor in found.items()}

    def forced[T](self, run: Callable[[], T]) -> T:
        """Call `run` with this candidate's kernels."""
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = self.kernels
        try:
            return run()
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before


def implementations(device: torch.device) -> list[str]:
    """Those of this project that `device` runs; the reference first."""
    compiled = native_library() is not None
    fast = ["triton"] if device.type == "cuda" else ["native"] if compiled else []
    return ["reference", "torch", *fast]


def check(candidates: Sequence[Candidate], tolerance: float) -> dict[str, float]:
    """Largest relative error of each against the first.

    Raises UltraMemError for one that is off by more than `tolerance`: nothing wrong is timed.
    """
    comparable = [c for c in candidates if c.gradients is not None]
    expected = comparable[0].results()
    errors = {}
    for candidate in comparable:
        found = candidate.results()
        errors[candidate.name] = max(_error(found[name], expected[name]) for name in expected)
        if not errors[candidate.name] <= tolerance:
            raise UltraMemError(
                f"{candidate.name} is off by {errors[candidate.name]:.1e} from "
                f"{comparable[0].name} (allowed {tolerance:.0e}): not timed. Please report it, "
                f"with the sizes printed above."
            )
    return errors


def _error(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))
