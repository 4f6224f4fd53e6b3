"""Door: parameters whose gradients are added on a stream of their own, beside the layers' backward.

DDP makes the node that accumulates a parameter's gradient, and keeps it; a node has the stream that
was current when it was made, and whatever brings it a gradient makes that stream wait. For
parameters in `streams` the node is made before, under their stream, so DDP finds that one.

Who waits for whom then:

* autograd lets a node wait for what its gradient comes from, and at the end of backward lets the
  stream that called it wait for the streams of all such nodes: whatever follows is in order;
* within backward, with --overlap-grad-reduce, a bucket's reduction starts when its last gradient
  has been added, on whichever stream that was. A bucket with such parameters starts it on their
  stream, which waits for the others' first; the layers wait for nothing.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ultramem_megatron.patches.patch import Editor, Patch

streams: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> torch.cuda.Stream, put there before DDP wraps the model."""

_STREAMS = "ultramem_streams"  # of a bucket group: the layers', then those of its parameters
_DDP = "megatron.core.distributed.distributed_data_parallel.DistributedDataParallel"
_START = "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.start_grad_sync"


def _with_nodes_before(original: Any) -> Any:
    @functools.wraps(original)
    def construct(
        self: Any, config: Any, ddp_config: Any, module: Any, *args: Any, **more: Any
    ) -> None:
        nodes = [
            _node(p, streams[p]) for p in module.parameters() if p in streams and p.requires_grad
        ]
        original(self, config, ddp_config, module, *args, **more)
        if not nodes:
            return
        layers = torch.cuda.current_stream()
        for group in [*self.bucket_groups, *self.expert_parallel_bucket_groups]:
            parameters = [p for bucket in group.buckets for p in bucket.params_list]
            own = dict.fromkeys(streams[p] for p in parameters if p in streams)
            setattr(group, _STREAMS, (layers, *own) if own else ())

    return construct


def _node(parameter: Tensor, stream: torch.cuda.Stream) -> Any:
    with torch.cuda.stream(stream):
        expanded = parameter.expand_as(parameter)
    assert expanded.grad_fn is not None
    return expanded.grad_fn.next_functions[0][0]


def _on_the_last_stream(original: Any) -> Any:
    @functools.wraps(original)
    def start_grad_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        *others, own = getattr(self, _STREAMS, ()) or (None,)
        in_backward = torch._C._current_graph_task_id() >= 0
        if own is None or not in_backward:
            return original(self, *args, **kwargs)
        for stream in others:
            own.wait_stream(stream)
        with torch.cuda.stream(own):
            return original(self, *args, **kwargs)

    return start_grad_sync


def _install(editor: Editor) -> None:
    editor.wrap(f"{_DDP}.__init__", _with_nodes_before)
    editor.wrap(_START, _on_the_last_stream, ("self", "force_all_reduce"))


PATCH = Patch(
    name="doors.gradient_streams",
    symbols=(f"{_DDP}.__init__", _START),
    reason="DDP makes the nodes that accumulate gradients itself, all on one stream.",
    delete_when="DDP takes streams for parameters, or makes a node with its first gradient.",
    install=_install,
)
