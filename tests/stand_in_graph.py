"""What a CUDA graph does, on a CPU: operations recorded once, replayed on the same memory.

As in a capture, whatever Python decided while recording stays decided, and nothing may ask for a
tensor's content: reading it on the host, or an operation whose output's size depends on it.
"""

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

_READS_ON_HOST = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::equal",
    "aten::repeat_interleave.Tensor",
}

_ATTENTION = "flash_decode_and_prefill"


class HostReadError(Exception):
    """A capture on a GPU would fail here."""


class StandInGraph(TorchDispatchMode):
    """Records what is computed inside `with`; `replay` computes it again, in place."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._scattered: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_mask = func.name().startswith(("aten::index.", "aten::index_put")) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func.name() in _READS_ON_HOST or by_mask:
            raise HostReadError(func.name())
        out = func(*args, **kwargs)
        # Who waits for gloo's scatter copies a part to where it belongs; a replay waits, too.
        if func.name() == "aten::copy_" and args[0].data_ptr() in self._scattered:
            self._scattered.remove(args[0].data_ptr())
            return out
        if func.name() == "c10d::_reduce_scatter_base_":
            self._scattered.add(args[0].data_ptr())
        self._calls.append((func, args, kwargs, out))
        return out

    def __len__(self) -> int:
        return len(self._calls)

    def replay(self) -> None:
        """The same operations on what the same tensors hold now."""
        for func, args, kwargs, out in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if not isinstance(old, torch.Tensor):
                    if hasattr(new, "wait"):  # a collective's
                        new.wait()
                elif old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class StandInManager(torch.nn.Module):
    """In place of Megatron's CudaGraphManager: one stand-in graph for each size of a step."""

    recorded = 0
    replayed = 0

    def __init__(self, config: Any) -> None:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        super().__init__()
        assert config.cuda_graph_impl == "local"
        assert get_cuda_rng_tracker().is_inference_rng_tracker  # Megatron's manager asserts it too
        self._graphs: dict[Any, tuple[StandInGraph, Any, torch.Tensor]] = {}

    def __call__(self, module: Any, args: tuple[()], kwargs: Any) -> tuple[torch.Tensor]:
        """The module's output for these arguments, as Megatron's manager returns it."""
        from megatron.core.transformer.attention import Attention
        from megatron.core.transformer.module import MegatronModule

        assert not args, "the block is called by keywords"
        key = kwargs["inference_context"].padded_batch_dimensions
        if key not in self._graphs:
            inputs = tree_map_only(torch.Tensor, torch.clone, kwargs)
            forward = super(MegatronModule, module).__call__
            with patch(f"{Attention.__module__}.Attention.{_ATTENTION}", _decode_attention):
                forward(**inputs)  # Megatron, too, warms up, so that nothing lasting is captured
                with StandInGraph() as graph:
                    out = forward(**inputs)
            self._graphs[key] = graph, inputs, out
            StandInManager.recorded += 1
        graph, inputs, out = self._graphs[key]
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor):
                inputs[name].copy_(value)
        graph.replay()
        StandInManager.replayed += 1
        return (out.clone(),)


class StandInTrainingManager(torch.nn.Module):
    """In place of Megatron's CudaGraphManager around a layer or a method of it, in training.

    As Megatron's, it has a pair of graphs for each micro-batch that waits for its backward.
    """

    recorded = 0
    replayed = 0

    def __init__(self, config: Any, base_module: Any = None, function_name: str = "") -> None:
        super().__init__()
        assert config.cuda_graph_impl == "local"
        self.runners: list[_TwoGraphs] = []
        if function_name:
            self.function = getattr(base_module, function_name)
            self.parameters_of = base_module.parameters
            setattr(base_module, function_name, self._run)

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
        """The whole layer's output, as Megatron asks for it."""
        from megatron.core.transformer.module import MegatronModule

        self.function = super(MegatronModule, module).__call__
        self.parameters_of = module.parameters
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.function(*args, **kwargs)
        leaves = tree_flatten((args, kwargs))[0]
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        runner = next((runner for runner in self.runners if not runner.waits), None)
        if runner is None:
            parameters = [p for p in self.parameters_of() if p.requires_grad]
            runner = _TwoGraphs(self.function, args, kwargs, parameters)
            self.runners.append(runner)
            StandInTrainingManager.recorded += 1
        StandInTrainingManager.replayed += 1
        outputs = iter(_Replayed.apply(runner, *given, *runner.reached))
        return tuple(next(outputs) if torch.is_tensor(o) else o for o in runner.outputs)


class _TwoGraphs:
    """A function's graph and that of its backward, on buffers of their own."""

    def __init__(self, function: Any, args: Any, kwargs: Any, parameters: list[Any]) -> None:
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

        def fixed(given: torch.Tensor) -> torch.Tensor:
            return given.detach().clone().requires_grad_(given.requires_grad)

        args, kwargs = tree_map_only(torch.Tensor, fixed, (args, kwargs))
        self.inputs = [x for x in tree_flatten((args, kwargs))[0] if torch.is_tensor(x)]
        # Its fork compares the host's generator, which a capture of a GPU's work does not see.
        no_fork = patch.object(CudaRNGStatesTracker, "fork", lambda *_: nullcontext())
        with no_fork, StandInGraph() as self.forward:
            self.outputs = function(*args, **kwargs)
        given = [o for o in self.outputs if torch.is_tensor(o)]
        self.received = [torch.zeros_like(o) for o in given]
        wanted = [x for x in (*self.inputs, *parameters) if x.requires_grad]
        with StandInGraph() as self.backward:
            found = torch.autograd.grad(given, wanted, self.received, allow_unused=True)
        of = {id(x): gradient for x, gradient in zip(wanted, found, strict=True)}
        self.reached = [p for p in parameters if of[id(p)] is not None]
        self.gradients = [of.get(id(x)) for x in (*self.inputs, *self.reached)]
        self.waits = False


class _Replayed(torch.autograd.Function):
    """Both graphs of a `_TwoGraphs`, forward and backward."""

    @staticmethod
    def forward(ctx: Any, runner: _TwoGraphs, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.runner, runner.waits = runner, True
        for fixed, given in zip(runner.inputs, inputs, strict=False):
            fixed.detach().copy_(given)
        runner.forward.replay()
        return tuple(o.detach().clone() for o in runner.outputs if torch.is_tensor(o))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        for fixed, given in zip(ctx.runner.received, gradients, strict=True):
            fixed.copy_(given)
        ctx.runner.backward.replay()
        ctx.runner.waits = False
        return None, *(None if g is None else g.clone() for g in ctx.runner.gradients)


def _decode_attention(
    self: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqlens_k: torch.Tensor,
    block_table: torch.Tensor,
    is_decode_only: bool,
    softmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Of one query per request over the paged cache, without reading on the host.

    Signature and shapes as Megatron's `flash_decode_and_prefill`.
    """
    assert is_decode_only
    assert softmax_offset is None
    repeat = q.shape[2] // k.shape[2]
    keys, values = (
        cache[block_table.long()].flatten(1, 2).repeat_interleave(repeat, 2) for cache in (k, v)
    )
    scores = torch.einsum("qhd,qkhd->qhk", q[:, 0], keys) * q.shape[-1] ** -0.5
    seen = torch.arange(keys.shape[1]) < seqlens_k[:, None]
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    weights = weights.masked_fill(~seen[:, None], 0)  # rows of padding see nothing
    values = values.masked_fill(~seen[..., None, None], 0)  # what nobody wrote may be NaN
    return torch.einsum("qhk,qkhd->qhd", weights, values).unsqueeze(1)
