"""Without CUDA: "cuda" means the CPU, and torch.cuda answers for it."""

import inspect
import threading
from typing import Any

import pytest
import torch

from tests.ranks import RanksFailed, run_on_ranks
from ultramem_megatron.patches.cpu import cuda_calls as cpu_cuda_calls
from ultramem_megatron.patches.cpu import devices as cpu_devices
from ultramem_megatron.patches.cpu import no_compile as cpu_no_compile
from ultramem_megatron.patches.patch import Editor


@pytest.fixture
def on_cpu() -> Any:
    """The patches of PyTorch in force, undone afterwards."""
    editors = [Editor("test") for _ in range(3)]
    for editor, module in zip(editors, (cpu_devices, cpu_cuda_calls, cpu_no_compile), strict=True):
        module.PATCH.install(editor)
    yield
    for editor in reversed(editors):
        editor.revert()


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0, torch.device("cuda", 1), "cpu", None])
def test_constructors_accept_every_way_to_write_the_device(on_cpu: None, device: Any) -> None:
    made = [
        torch.tensor([1.0], device=device),
        torch.empty(2, device=device),
        torch.zeros_like(torch.ones(2), device=device),
        torch.randn(2, device=device),
        torch.ones(2).new_full((2,), 3.0, device=device),
        torch.nn.Linear(2, 2, device=device).weight,
    ]
    assert all(tensor.device.type == "cpu" for tensor in made)


def test_moves_to_cuda_stay(on_cpu: None) -> None:
    x = torch.arange(3.0)
    assert x.to("cuda") is x
    assert x.cuda(non_blocking=True) is x
    assert x.to(device="cuda:0", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert x.to(torch.int64).dtype == torch.int64
    assert torch.nn.Linear(2, 2).cuda(0).weight.device.type == "cpu"


def test_other_devices_are_left_alone(on_cpu: None) -> None:
    assert torch.empty(2, device="meta").device.type == "meta"
    assert torch.ones(2).to("meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
        assert torch.tensor([1.0]).device.type == "meta"


def test_other_threads_see_it_too(on_cpu: None) -> None:
    seen: list[str] = []
    worker = threading.Thread(target=lambda: seen.append(torch.zeros(1, device="cuda").device.type))
    worker.start()
    worker.join()
    assert seen == ["cpu"]


def test_after_reverting_cuda_is_refused_again() -> None:
    editor = Editor("test")
    cpu_devices.PATCH.install(editor)
    editor.revert()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


def test_only_megatron_hears_of_cuda_types(on_cpu: None) -> None:
    x = torch.zeros(1)
    assert x.type() == "torch.FloatTensor"
    as_megatron: dict[str, Any] = {"__name__": "megatron.core.optimizer.optimizer", "x": x}
    exec("answer = x.type(); half = x.type('torch.HalfTensor').dtype", as_megatron)
    assert as_megatron["answer"] == "torch.cuda.FloatTensor"
    assert as_megatron["half"] == torch.float16


def test_torch_cuda_answers_like_one_device_that_never_lags(on_cpu: None) -> None:
    assert not torch.cuda.is_available()
    assert torch.cuda.current_device() == 0
    assert torch.cuda.device_count() == 1
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    context = torch.cuda.stream(stream)
    with context:
        pass
    with context:  # Megatron's DDP enters one twice with several optimizer instances
        event.record()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.current_stream().wait_event(event)
    torch.cuda.synchronize()
    assert event.query()
    assert event.elapsed_time(stream.record_event()) == 0.0


def test_a_stream_knows_its_device(on_cpu: None) -> None:
    stream = torch.cuda.Stream()
    assert torch.zeros(1, device="cuda").device == stream.device
    assert torch.cuda.current_stream(stream.device).device == stream.device


def test_memory_figures_are_those_of_the_process(on_cpu: None) -> None:
    before = torch.cuda.memory_allocated()
    big = torch.ones(128 * 2**20 // 4)  # more than an allocator keeps for later
    assert torch.cuda.memory_allocated() - before > 16 * 2**20
    assert torch.cuda.max_memory_allocated() >= torch.cuda.memory_allocated()
    assert torch.cuda.memory_stats()["allocated_bytes.all.current"] >= big.nbytes


def test_the_random_state_is_that_of_the_cpu(on_cpu: None) -> None:
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), first)


def test_compiled_functions_run_as_written() -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("the compiler was called")

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    editor = Editor("test")
    cpu_no_compile.PATCH.install(editor)
    assert compiled(torch.ones(1)).item() == 2.0
    editor.revert()
    with pytest.raises(Exception, match="the compiler was called"):
        compiled(torch.ones(1))


def test_the_compiler_lists_torch_anew(on_cpu: None) -> None:
    """As it does after `destroy_process_group`; it takes no object with two rules."""
    rules = torch._dynamo.trace_rules
    rules.clear_lru_cache()
    try:
        with torch.compiler.set_stance("default"):
            compiled = torch.compile(lambda x: x + torch.ones(3), backend="eager", fullgraph=True)
            assert compiled(torch.ones(3)).tolist() == [2, 2, 2]
    finally:
        rules.clear_lru_cache()


def _draw_from_megatrons_streams() -> dict[str, Any]:
    import logging

    from megatron.core.tensor_parallel import random

    from ultramem_megatron.patches import registry

    registry.apply_all()
    warnings: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    handler = Handler()
    logging.getLogger(random.__name__).addHandler(handler)
    random.model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0)
    tracker = random.get_cuda_rng_tracker()
    plain = torch.rand(3)
    random.model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0)
    with tracker.fork():
        first = torch.rand(3)
    undisturbed = torch.rand(3)
    with tracker.fork():
        second = torch.rand(3)
    random.model_parallel_cuda_manual_seed(5, tp_rank=1, ep_rank=0, etp_rank=0)
    with tracker.fork():
        other_rank = torch.rand(3)
    return {
        "plain": plain,
        "first": first,
        "undisturbed": undisturbed,
        "second": second,
        "other_rank": other_rank,
        "warnings": warnings,
    }


def test_megatrons_random_streams_are_separate() -> None:
    [draws] = run_on_ranks(1, _draw_from_megatrons_streams)
    assert torch.equal(draws["plain"], draws["undisturbed"])
    assert not torch.equal(draws["first"], draws["second"])
    assert not torch.equal(draws["first"], draws["plain"])
    assert not torch.equal(draws["first"], draws["other_rank"])
    assert draws["warnings"] == []


def _draw_from_forked_streams(graph_safe: bool) -> list[torch.Tensor]:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, convert_cuda_rng_state

    from ultramem_megatron.patches import registry

    registry.apply_all()
    tracker = CudaRNGStatesTracker(use_cudagraphable_rng=graph_safe)
    tracker.add("a", 1)
    tracker.add("b", 2)
    drawn = []
    with tracker.fork("a"):
        drawn.append(torch.rand(3))
        with tracker.fork("b"):
            drawn.append(torch.rand(3))
        drawn.append(torch.rand(3))
    with tracker.fork("b"):
        drawn.append(torch.rand(3))
    state = convert_cuda_rng_state(tracker.get_states()["a"], to_graphable=False)
    assert isinstance(convert_cuda_rng_state(state, to_graphable=True), torch.Generator)
    return drawn


def test_streams_that_a_cuda_graph_could_hold_draw_the_same_numbers() -> None:
    [plain] = run_on_ranks(1, _draw_from_forked_streams, False)
    [graph_safe] = run_on_ranks(1, _draw_from_forked_streams, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, graph_safe, strict=True))
    assert not torch.equal(plain[0], plain[2])


def _room(patched: bool) -> str:
    from megatron.core.dist_checkpointing import ShardedTensor

    from ultramem_megatron.patches import registry

    # Of before the constructors were replaced, as where Megatron is imported first.
    empty = inspect.signature(ShardedTensor.init_data).parameters["init_fn"].default
    assert empty is torch.empty
    names = ("cpu.devices", "cpu.loaded_shards") if patched else ("cpu.devices",)
    registry.apply_all(names)
    shard = ShardedTensor.from_rank_offsets("weight", torch.ones(4)).without_data()
    shard.init_data("cuda")
    return shard.data.device.type


def test_room_for_shards_of_other_ranks_is_on_the_host() -> None:
    assert run_on_ranks(1, _room, True) == ["cpu"]
    with pytest.raises(RanksFailed, match=r"CUDA|NVIDIA"):
        run_on_ranks(1, _room, False)
