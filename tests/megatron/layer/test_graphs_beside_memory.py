"""--cuda-graph-impl local: graphs hold Megatron's layers, memories run beside them.

There is no GPU in these tests: `tests/stand_in_graph.py` records a layer once, forward and
backward, and replays it, with the rules of a capture.
"""

from typing import Any

import pytest
import torch

from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt

_FLAGS = {
    "num_layers": 4,
    "ultramem_spans": "1:3/4:4",
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
    "micro_batch_size": 2,
}
_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "bf16, tied values": (1, {"bf16": True, "ultramem_share_values": 2}),
    "tensor and sequence parallel": (
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "a span over two stages": (2, {"pipeline_model_parallel_size": 2}),
    "in the place of MLPs": (1, {"ultramem_spans": "2:2/4:4", "ultramem_replace_mlp": True}),
    "attention named": (1, {"cuda_graph_modules": "attn"}),
}


def _stand_ins() -> None:
    """In a rank: graphs of this file's, on a machine without a GPU."""
    from megatron.core.transformer import cuda_graphs

    from tests.stand_in_graph import StandInTrainingManager
    from ultramem_megatron.megatron.flags import missing_packages

    cuda_graphs.CudaGraphManager = StandInTrainingManager
    missing_packages._has_gpu = lambda: True


def _counted(trained: Any) -> tuple[int, int, int]:
    """How many parts have graphs, how many those are, how often one was replayed."""
    from tests.stand_in_graph import StandInTrainingManager as Stand

    parts = [part for chunk in trained.model for part in chunk.modules()]
    used = [part for part in parts if isinstance(part, Stand) and part.runners]
    return len(used), Stand.recorded, Stand.replayed


@pytest.mark.parametrize("name", ["one rank", "a span over two stages"])
def test_layers_replayed_beside_memories_train_as_without_graphs(name: str) -> None:
    _same(name)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted({*_LAYOUTS} - {"one rank", "a span over two stages"}))
def test_layers_of_other_layouts_train_as_without_graphs(name: str) -> None:
    _same(name)


def _same(name: str) -> None:
    ranks, changes = _LAYOUTS[name]
    flags = {**_FLAGS, **changes}
    scope = flags.pop("cuda_graph_modules", None)
    plain = run_pretrain(ranks, tiny_gpt(**flags), gradients_at=2, parameters=True)
    flags |= {"cuda_graph_impl": "local", "cuda_graph_modules": scope}
    graphed = run_pretrain(
        ranks,
        tiny_gpt(**flags),
        gradients_at=2,
        parameters=True,
        before=_stand_ins,
        on_finish=_counted,
    )
    assert graphed.losses == plain.losses
    stages = flags.get("pipeline_model_parallel_size", 1)
    for one, other in zip(graphed.ranks, plain.ranks, strict=True):
        managers, recorded, replayed = one.finished
        assert managers == 4 // stages
        assert managers <= recorded <= stages * managers  # one for each micro-batch in flight
        assert replayed == managers * 3 * 4  # three steps of four micro-batches
        assert one.gradients.keys() == other.gradients.keys()
        for what in ("gradients", "parameters"):
            for parameter, value in getattr(other, what).items():
                assert torch.equal(getattr(one, what)[parameter], value), (what, parameter)


def test_what_a_graph_holds_is_the_layer_without_its_memory() -> None:
    """A capture of the whole layer, as Megatron has it, meets what a memory asks the host."""
    with pytest.raises(RanksFailed, match="HostReadError"):
        run_pretrain(1, tiny_gpt(**_FLAGS, cuda_graph_impl="local"), before=_whole_layers)


def _whole_layers() -> None:
    """In a rank: graphs of whole layers, as without our `create_mcore_cudagraph_manager`."""
    from ultramem_megatron.megatron.layer.transformer_layer import MemoryLayerMixin

    _stand_ins()
    del MemoryLayerMixin.create_mcore_cudagraph_manager  # Megatron's own is left
