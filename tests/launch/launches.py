"""Launches of a memory layer on a GPU, counted without one: on the meta device.

There are no numbers there: whatever reads one on the host raises, so a step that can be counted
waits for nothing.
"""

from collections import Counter
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launch.gpu_report.parts.layer import _layer
from ultramem_megatron.kernels import dispatch

_NO_KERNEL = {"empty", "empty_like", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
_NO_KERNEL |= {"_sparse_coo_tensor_with_dims_and_tensors"}  # main_grad.py's, without entries


class Launches(TorchDispatchMode):
    """Operations that compute, by name, and kernels of Triton, which are not run."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        nothing = any(arg.is_sparse for arg in args if isinstance(arg, torch.Tensor))  # the dummy
        if not func.is_view and name not in _NO_KERNEL and not nothing:
            self.of[name] += 1
        return func(*args, **(kwargs or {}))

    def kernel(self, function, *args, **kwargs):
        """In place of Triton's `JITFunction.run`."""
        self.of[function.fn.__name__] += 1


def launches_of_a_layer(keys, taps):
    """In a step that is not the first: filter update, forward and backward."""
    from triton.runtime.jit import JITFunction

    def run(function, *args, **kwargs):
        counted.kernel(function)

    with (
        patch.object(JITFunction, "run", run),
        patch.object(dispatch, "_choose", lambda device, forced: "triton"),
    ):
        layer, x = _layer(keys, taps, torch.device("meta"), large=True)
        counted = Launches()
        layer(x)  # makes the counters of reads
        counted.of.clear()
        with counted:
            layer.end_batch()
            layer.after_step()
            output = layer(x)
            output.backward(output.detach())
    return counted.of
