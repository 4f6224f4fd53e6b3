"""A memory's branch: what it computes beside the layers of its span, with --ultramem-overlap.

Whatever a memory waits for (the other ranks' answers) travels while transformer layers compute. The
branch starts after layer a and goes on at boundaries: after the attention of each layer beside it
and after the layer. Its pauses are spread evenly over the boundaries, each wait as late as it can
be, the last at the join. Autograd takes operations in the reverse of the order in which forward
took them, so in backward, too, each transfer has the same layers between its issue and its wait.

On a GPU the branch has a stream of its own. It starts behind what was enqueued before it, and the
layers go on behind it only at the join; autograd gives its backward the same stream. Whoever uses a
gradient that comes from there waits for that stream, which is why the lookup, though it adds to
Megatron's `main_grad` itself, must hand autograd a dummy rather than nothing. Gradients of a
memory's own parameters are added on that stream too (`patches/doors/gradient_streams.py`).

Several NCCL communicators are then in use at once, as they are with Megatron's own overlaps. Every
rank enqueues their kernels in the same order, and with CUDA_DEVICE_MAX_CONNECTIONS=1 they also
start in it, so no two ranks can wait for each other crosswise. With more connections kernels of two
communicators may start in either order; each takes a small part of a GPU, so both find room. With
one connection exchanges still run beside the layers, but the branch's own kernels, queued between
those of the layers, do not; with more (tensor and context parallel size 1, or Blackwell) they do.
"""

import functools

import torch
from torch import Tensor

from ultramem_megatron.communication.pausing import Pausing


class Branch:
    """The steps of one memory under way."""

    def __init__(self, steps: Pausing, x: Tensor, *, pauses: int, boundaries: int) -> None:
        """Start, up to the first pause. x: what the steps read, made by the current stream.

        pauses: how often the steps pause. boundaries: how often `go_on` or, at last, `join` will be
        called.
        """
        self._steps = steps
        self._pauses, self._boundaries = pauses, boundaries
        self._paused = self._passed = 0
        self._result: Tensor | None = None
        self._stream = stream_beside(x.device)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            # x may be freed as soon as the layers no longer need it.
            x.record_stream(self._stream)
        self._resume()

    def go_on(self) -> None:
        """At a boundary: continue after the pauses that are over by now."""
        self._passed += 1
        while self._paused < self._passed * self._pauses // self._boundaries:
            self._paused += 1
            self._resume()

    def join(self) -> Tensor:
        """The result, which the current stream may use from here on."""
        while self._result is None:
            self._resume()
        if self._stream is not None:
            layers = torch.cuda.current_stream()
            layers.wait_stream(self._stream)
            self._result.record_stream(layers)
        return self._result

    def _resume(self) -> None:
        with torch.cuda.stream(self._stream):
            try:
                next(self._steps)
            except StopIteration as end:
                self._result = end.value


def stream_beside(device: torch.device) -> torch.cuda.Stream | None:
    """The one stream of all branches on a GPU; None where the device has no streams."""
    return _stream_beside(device) if device.type == "cuda" else None


@functools.cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
