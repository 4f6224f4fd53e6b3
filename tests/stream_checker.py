"""What streams order on a GPU, on a CPU: each operation has a stream, and must come after others.

Every stream counts its operations and knows how far it has waited for each of the others. An
operation that reads a tensor must come after the one that wrote it, one that writes it after all
that read and wrote it; memory given back by the last user of a tensor may be had by its own stream
only when other streams have ended with it, or `record_stream` has been called. What comes first by
chance is an error here as what is late on a GPU.

Autograd's part is as PyTorch documents it ("Stream semantics of backward passes"): a node has the
stream that was current when it was made, waits for the nodes that its gradients come from, and who
calls backward waits at its end for all nodes without successors. A node of a parameter that is kept
alive is made once: whoever takes `expand_as` of a parameter keeps it, as DDP does.
"""

import bisect
import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LEAF = 2**64 - 1  # sequence number of nodes that accumulate
_READ_NO_CONTENT = ("aten::new_empty", "aten::empty_like", "aten::new_zeros", "aten::zeros_like")


class Stream:
    """Stands in for torch.cuda.Stream."""

    def __init__(self, name: str) -> None:
        self.name, self.done = name, 0
        self.seen: dict[Stream, int] = {}

    def wait_stream(self, other: "Stream") -> None:
        self.wait_for(other.now())

    def now(self) -> dict["Stream", int]:
        """How far each stream has come for whoever waits for this one here."""
        return {**self.seen, self: self.done}

    def wait_for(self, moment: dict["Stream", int]) -> None:
        for stream, done in moment.items():
            if stream is not self:
                self.seen[stream] = max(self.seen.get(stream, 0), done)

    def comes_after(self, operation: "_Operation") -> bool:
        return operation.stream is self or self.seen.get(operation.stream, 0) >= operation.number


class _Operation:
    def __init__(self, stream: Stream, name: str) -> None:
        stream.done += 1
        self.stream, self.number, self.name = stream, stream.done, name


class _Use(NamedTuple):
    first: int  # bytes of the storage, or more, where strides leave some out
    end: int
    operation: _Operation
    writes: bool


class _Memory:
    """A storage: the stream it was allocated on, and what has been done to which bytes of it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.uses: list[_Use] = []
        self.users: dict[Stream, _Operation] = {}
        self.recorded: set[Stream] = set()

    def use(self, new: _Use) -> Iterator[_Operation]:
        """What the new use must come after; it is known from then on."""
        kept = []
        for use in self.uses:
            if (new.writes or use.writes) and use.first < new.end and new.first < use.end:
                yield use.operation
            if not (new.writes and new.first <= use.first and use.end <= new.end):
                kept.append(use)
        self.uses = [*kept, new]
        self.users[new.operation.stream] = new.operation


class StreamChecker(TorchDispatchMode):
    """Within it, operations are checked; `torch.cuda`'s streams are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.transfers = Stream("layers"), Stream("transfers")
        self.engine = Stream("autograd")  # adds gradients up, in order by itself
        self.current = self.layers
        self.others = 0  # operations that ran on other streams than `layers`
        self._memories: dict[int, _Memory] = {}
        self._made_on: tuple[list[int], list[Stream]] = ([0], [self.layers])
        self._leaves: dict[int, Stream] = {}
        self._between_nodes = False
        self.errors: list[str] = []

    @contextlib.contextmanager
    def checking(self) -> Iterator["StreamChecker"]:
        """Everything within is seen; `errors` says what nothing puts in order."""
        calls = {
            "stream": self._on,
            "current_stream": lambda device=None: self.current,
            "Stream": lambda *_, **__: Stream("made"),
        }
        with contextlib.ExitStack() as stack:
            for name, call in calls.items():
                stack.enter_context(patch.object(torch.cuda, name, call))
            stack.enter_context(patch.object(dist.Work, "wait", self._waiting(dist.Work.wait)))
            stack.enter_context(patch.object(Tensor, "record_stream", lambda *a: self.record(*a)))
            stack.enter_context(_Functions(self))
            with self:
                yield self

    @contextlib.contextmanager
    def _on(self, stream: Stream | None) -> Iterator[None]:
        before = self.current
        self._switch(self.current if stream is None else stream)
        try:
            yield
        finally:
            self._switch(before)

    def _waiting(self, wait: Any) -> Any:
        def wait_on_the_stream(work: Any, *args: Any) -> Any:
            self.current.wait_stream(self.transfers)
            return wait(work, *args)

        return wait_on_the_stream

    def _switch(self, stream: Stream) -> None:
        self.current = stream
        numbers, streams = self._made_on
        numbers.append(torch.autograd._get_sequence_nr())
        streams.append(stream)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        transfer = func.name().startswith("c10d::")
        stream = (
            self.transfers if transfer else self.engine if self._between_nodes else self.current
        )
        if transfer:
            stream.wait_stream(self.current)
        self.others += stream is not self.layers
        operation = _Operation(stream, func.name())
        written = _written(func, args, kwargs)
        for tensor in () if func.name().startswith(_READ_NO_CONTENT) else before.values():
            self._touch(tensor, operation, transfer or id(tensor) in written)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor) not in before:
                self._touch(tensor, operation, True)
        return out

    def _touch(self, tensor: Tensor, operation: _Operation, writes: bool) -> None:
        for part in _parts(tensor):
            storage, key = part.untyped_storage(), part.untyped_storage()._cdata
            if key not in self._memories:  # what was done before checking began is in order
                self._memories[key] = _Memory(operation.stream)
                weakref.finalize(storage, self._freed, key)
            first, end = _bytes(part)
            for other in self._memories[key].use(_Use(first, end, operation, writes)):
                stream = operation.stream
                if stream is not self.engine and not stream.comes_after(other):
                    self.errors.append(
                        f"{operation.name} on {stream.name} does not wait for {other.name} on "
                        f"{other.stream.name}"
                    )

    def _freed(self, key: int) -> None:
        memory = self._memories.pop(key)
        for stream, last in memory.users.items():
            known = {memory.stream, self.engine, self.transfers, *memory.recorded}
            if stream not in known and not memory.stream.comes_after(last):
                self.errors.append(
                    f"memory of {memory.stream.name} is given back while {last.name} on "
                    f"{stream.name} may use it"
                )

    def record(self, tensor: Tensor, stream: Stream) -> None:
        """As Tensor.record_stream."""
        for part in _parts(tensor):
            memory = self._memories.get(part.untyped_storage()._cdata)
            if memory is not None:
                memory.recorded.add(stream)

    def leaf_made(self, parameter: Tensor) -> None:
        """Somebody has made the parameter's node, and keeps it."""
        self._leaves.setdefault(id(parameter), self.current)

    def stream_of(self, node: Any) -> Stream:
        """Of a node of autograd's graph."""
        if node._sequence_nr() == _LEAF:
            return self._leaves.get(id(node.variable), self.layers)
        numbers, streams = self._made_on
        return streams[bisect.bisect_right(numbers, node._sequence_nr()) - 1]

    def backward(self, output: Tensor, gradient: Tensor) -> None:
        """As output.backward(gradient)."""
        caller, ends = self.current, set()
        produced: dict[Any, list[dict[Stream, int]]] = {}
        nodes = _nodes(output.grad_fn)
        produced[output.grad_fn] = [caller.now()]

        def begin(node: Any, gradients: Any) -> None:
            self._between_nodes = False
            self.current = self.stream_of(node)
            for moment in produced[node]:
                self.current.wait_for(moment)
            self.current.wait_for({self.engine: self.engine.done})
            for one in gradients:
                if one is not None:  # as the engine does
                    self.record(one, self.current)

        def end(node: Any) -> None:
            for successor, _ in node.next_functions:
                if successor is not None:
                    produced.setdefault(successor, []).append(self.current.now())
            if node._sequence_nr() == _LEAF:
                ends.add(self.current)
            self._between_nodes = True

        for node in nodes:
            node.register_prehook(lambda gradients, node=node: begin(node, gradients))
            node.register_hook(lambda *_, node=node: end(node))
        self._between_nodes = True
        output.backward(gradient)
        self._between_nodes = False
        self.current = caller
        for stream in ends:
            caller.wait_stream(stream)


class _Functions(TorchFunctionMode):
    """What streams need of calls that no operation shows."""

    def __init__(self, checker: StreamChecker) -> None:
        super().__init__()
        self._checker = checker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.expand_as and args[0].is_leaf and args[0].requires_grad:
            self._checker.leaf_made(args[0])
        return func(*args, **(kwargs or {}))


def _nodes(root: Any) -> list[Any]:
    found, open_ = {root}, [root]
    while open_:
        for node, _ in open_.pop().next_functions:
            if node is not None and node not in found:
                found.add(node)
                open_.append(node)
    return list(found)


def _written(func: Any, args: Any, kwargs: Any) -> set[int]:
    """Ids of the arguments that an operation changes."""
    arguments = func._schema.arguments
    pairs = list(zip(arguments, args, strict=False))
    pairs += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
    changed = [value for a, value in pairs if a.alias_info is not None and a.alias_info.is_write]
    return {id(tensor) for tensor in tree_leaves(changed)}


def _parts(tensor: Tensor) -> list[Tensor]:
    return [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a strided tensor in its storage, and the one after the last."""
    first = int(tensor.storage_offset())
    if not tensor.numel():
        return first, first
    last = first + sum(int((n - 1) * s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return first * tensor.element_size(), (last + 1) * tensor.element_size()
