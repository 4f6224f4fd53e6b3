"""Decoding steps can be captured: nothing in them reads on the host, replays follow their inputs.

There is no GPU in these tests: `tests/stand_in_graph.py` keeps the rules of a capture on a CPU.
"""

from collections import defaultdict
from unittest.mock import patch

import pytest
import torch

from tests.closeness import assert_close
from tests.decoding import (
    KINDS,
    LOGITS,
    NumberTokenizer,
    dynamic_logits,
    flags_of,
    full_logits,
    random_model,
)
from tests.ranks import run_on_ranks
from tests.stand_in_graph import StandInGraph, StandInManager

_GRAPHED = [kind for kind in KINDS if "moe" not in kind]
_PREFILL = 5
# PyTorch's own selection asks the host about ties; the kernels of GPUs do not.
_KERNELS = {"ULTRAMEM_KERNELS": "reference"}


def _captured(kinds, layout):
    """Logits of dynamic batching with graphs, of a full forward; how many graphs, how often."""
    from megatron.core.transformer import cuda_graphs

    from ultramem_megatron.inference.layout import InferenceLayout
    from ultramem_megatron.inference.loading import build_model, prepare_for_inference
    from ultramem_megatron.megatron.flags.parse import args_from_flags

    tokens = torch.randint(500, (5, 12), generator=torch.Generator().manual_seed(0))
    results = {}
    for kind in kinds:
        StandInManager.recorded = StandInManager.replayed = 0
        with patch.object(cuda_graphs, "CudaGraphManager", StandInManager):
            model = build_model(
                args_from_flags(flags_of(kind)), InferenceLayout(*layout), cuda_graphs=True
            )
        prepare_for_inference(model)
        graphed = dynamic_logits(model, tokens, _PREFILL)
        counts = StandInManager.recorded, StandInManager.replayed
        results[kind] = graphed, full_logits(model, tokens), counts
    return results


@pytest.mark.parametrize(
    ("ranks", "layout"), [(1, ()), (2, (2, 2, "dimension")), (2, (2, 1, "auto"))]
)
def test_replayed_steps_equal_the_full_forward(ranks, layout):
    for rank in run_on_ranks(ranks, _captured, _GRAPHED, layout, env=_KERNELS):
        for kind, (graphed, whole, (recorded, replayed)) in rank.items():
            assert_close(graphed, whole[:, _PREFILL - 1 :], LOGITS, kind)
            assert 1 <= recorded <= 4, kind  # of 8 requests at most: 1, 2, 4, 8
            assert replayed > 2 * recorded, kind


def _replayed_benchmark_step():
    """Logits of a replayed step, of an eager one with the same tokens, of one with others."""
    from launch.benchmarks.decode_step import DecodeStep
    from launch.benchmarks.grouped_experts import group_experts
    from ultramem_megatron.inference.loading import prepare_for_inference

    found = {}
    for kind in ("dense", "moe", "ultramem", "pkm", "ultramem-conv"):
        model, _ = random_model(kind)
        prepare_for_inference(model)
        group_experts(model)
        step = DecodeStep(model, [3, 7, 5, 6], 500, places=10)
        with torch.inference_mode():
            step()  # the first makes the convolution's history
            before = step().clone()
            with StandInGraph() as graph:
                logits = step()
            step.tokens.copy_((step.tokens + 250) % 500)
            step.requests.positions.add_(1)
            histories = step.context.__dict__.get("ultramem_query_history", {})
            kept = {slot: history.clone() for slot, history in histories.items()}
            graph.replay()
            replayed = logits.clone()
            for slot, history in kept.items():
                histories[slot].copy_(history)
            found[kind] = replayed, step(), before
    return found


def test_a_step_of_the_benchmark_can_be_captured():
    for kind, (replayed, eager, before) in run_on_ranks(1, _replayed_benchmark_step, env=_KERNELS)[
        0
    ].items():
        assert torch.equal(replayed, eager), kind
        assert (eager - before).norm() > 0.05 * before.norm(), kind


def _record_a_layer(dtype):
    """Record, but do not replay, one token's way through a layer."""
    from tests.layers import HIDDEN, small_layer

    # Not calibrated: in the interpreter that takes most of a minute.
    layer = small_layer(dtype, init="official").eval()
    layer.prepare_for_inference()
    x = torch.randn(1, 1, HIDDEN, dtype=dtype)
    with torch.inference_mode():
        layer(x)
        with StandInGraph() as graph:
            layer(x)
    return len(graph)


def _outcome(function, *args):
    """What it raised."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _record_experts():
    from launch.benchmarks.decode_step import DecodeStep

    step = DecodeStep(random_model("moe")[0], [8] * 4, 500)
    with torch.inference_mode(), StandInGraph():
        step()


def _host_reads():
    return _outcome(_record_a_layer, torch.float32), _outcome(_record_experts)


def test_reads_on_the_host_are_seen():
    """PyTorch's kernels of memories, and experts: `--cuda-graphs` refuses both."""
    for raised in run_on_ranks(1, _host_reads, env={"ULTRAMEM_KERNELS": "torch"})[0]:
        assert raised.startswith("HostReadError: aten::")


def _refusal(kind, layout):
    from ultramem_megatron.inference.layout import InferenceLayout
    from ultramem_megatron.inference.loading import build_model
    from ultramem_megatron.megatron.flags.parse import args_from_flags

    args = args_from_flags(flags_of(kind))
    return _outcome(lambda: build_model(args, InferenceLayout(*layout), cuda_graphs=True))


@pytest.mark.parametrize(
    ("kind", "layout", "kernels", "message"),
    [
        ("ultramem", (2, 2, "number"), "reference", "number-wise, the host learns how much"),
        ("ultramem", (1, 2, "dimension"), "reference", "Use --ultramem-parallel-size 1"),
        ("moe", (2, None, "auto"), "reference", "the host tells experts how many tokens"),
        ("ultramem", (2, 1, "auto"), "torch", "Unset ULTRAMEM_KERNELS"),
    ],
)
def test_what_cannot_be_captured_is_refused(kind, layout, kernels, message):
    for raised in run_on_ranks(2, _refusal, kind, layout, env={"ULTRAMEM_KERNELS": kernels}):
        assert raised.startswith("UltraMemError: --cuda-graphs: ")
        assert message in raised


def _load_with_graphs():
    from ultramem_megatron.inference.loading import load_model

    return _outcome(lambda: load_model("nowhere", cuda_graphs=True))


def test_graphs_need_a_gpu():
    assert "--cuda-graphs: there is no NVIDIA GPU here" in run_on_ranks(1, _load_with_graphs)[0]


def _generated():
    """Texts from Megatron's dynamic engine, without graphs and with; how often one was replayed."""
    from megatron.core.inference.engines import dynamic_engine
    from megatron.core.transformer import cuda_graphs

    from ultramem_megatron.inference.generate import parse
    from ultramem_megatron.inference.layout import InferenceLayout
    from ultramem_megatron.inference.loading import LoadedModel, build_model
    from ultramem_megatron.inference.sampling import generate
    from ultramem_megatron.megatron.flags.parse import args_from_flags

    options = parse(["--load", "", "--batching", "dynamic", "--tokens", "9", "--temperature", "0"])
    options.top_p = 1.0
    no_memory = patch.object(torch.cuda, "memory_stats", lambda: defaultdict(int))
    no_pool = patch.object(dynamic_engine, "_cuda_graph_mempool_bytes", lambda: (0, 0))
    texts = []
    for graphs in (False, True):
        args = args_from_flags(flags_of("ultramem-conv"))
        with patch.object(cuda_graphs, "CudaGraphManager", StandInManager), no_memory, no_pool:
            model = build_model(args, InferenceLayout(), cuda_graphs=graphs).eval()
            loaded = LoadedModel(model, NumberTokenizer(), args)
            texts.append(generate(loaded, ["3 5 7", "8", "40 41 42 43 44 45 46"], options))
    return texts, StandInManager.recorded, StandInManager.replayed


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_engine_generates_the_same_with_graphs(ranks):
    for (eager, graphed), recorded, replayed in run_on_ranks(ranks, _generated, env=_KERNELS):
        assert eager == graphed
        assert len(set(eager)) == 3
        assert recorded >= 1
        assert replayed >= recorded + 8
