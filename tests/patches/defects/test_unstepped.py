"""A checkpoint of an optimizer that has not stepped, and the list of a checkpoint's tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import init_gloo, run_on_ranks
from ultramem_megatron.patches import registry


def _apply_but(name: str) -> None:
    registry.apply_all([patch.name for patch in registry.all_patches() if patch.name != name])


def _unstepped(half: bool) -> Any:
    """An optimizer with the state that Megatron loads into."""
    from megatron.core import distributed
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=2, num_attention_heads=1, bf16=half)
    linear = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16 if half else torch.float32)
    model = distributed.DistributedDataParallel(
        config, distributed.DistributedDataParallelConfig(), linear
    )
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=0.1, bf16=half), [model])
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer)
    return optimizer


def _loaded(half: bool) -> float:
    saved = _unstepped(half).state_dict()
    for state in saved.get("optimizer", saved)["state"].values():
        state.pop("step", None)  # a sharded checkpoint keeps no count of 0
    optimizer = _unstepped(half)
    optimizer.load_state_dict(saved)
    (state,) = optimizer.chained_optimizers[0].optimizer.state.values()
    return float(state["step"])


def _load_with_and_without() -> list[float]:
    from megatron.core import parallel_state

    _apply_but("defects.adam_first_steps")
    init_gloo()
    parallel_state.initialize_model_parallel()
    with pytest.raises(KeyError, match="step"):
        _loaded(half=True)
    registry.apply_all()
    return [_loaded(half=False), _loaded(half=True)]


def test_an_optimizer_that_has_not_stepped_loads() -> None:
    assert run_on_ranks(1, _load_with_and_without) == [[0.0, 0.0]]


def _list_with_and_without(folder: str) -> list[torch.dtype]:
    from megatron.core.dist_checkpointing import ShardedTensor, load_tensors_metadata, save

    _apply_but("defects.tensor_strides")
    init_gloo()
    save({"a": ShardedTensor.from_rank_offsets("a", torch.ones(2, 3).bfloat16())}, folder)
    with pytest.raises(TypeError, match="unexpected keyword argument 'strides'"):
        load_tensors_metadata(folder)
    registry.apply_all()
    return [tensor.dtype for tensor in load_tensors_metadata(folder).values()]


def test_tensors_of_a_checkpoint_are_listed(tmp_path: Path) -> None:
    assert run_on_ranks(1, _list_with_and_without, str(tmp_path)) == [[torch.bfloat16]]
