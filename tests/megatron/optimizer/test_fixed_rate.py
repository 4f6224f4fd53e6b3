"""A fixed learning rate of the tables, with every optimizer and in runs that go on."""

from pathlib import Path
from typing import Any

import pytest

from tests.training_runs import tiny_gpt
from tests.whole_model import (
    STEADY,
    assert_same_training,
    first_decided,
    train,
    train_watched,
    whole,
)

pytestmark = pytest.mark.long

_FLAGS: dict[str, Any] = {
    "ultramem_spans": "1:2",
    "ultramem_num_keys": 11,
    "ultramem_topk": 6,
    "ultramem_query_conv_kernel": 3,
    "disable_bias_linear": True,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 3,
    "lr_decay_iters": 10,
    "train_iters": 4,
    **STEADY,
}
_DIST = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}
_TABLE = "memory.values.weight"


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon"}, {"optimizer": "soap"}, _DIST])
def test_the_first_step_of_the_warm_up_is_as_large_as_any(changes: dict[str, Any]) -> None:
    """Two rates: Adam's first step moves each value by the rate, and nothing else differs."""
    high, low = (
        whole(
            train(
                2, tiny_gpt(**{**_FLAGS, **changes, "train_iters": 1}, ultramem_value_lr_fixed=r)
            ),
            "parameters",
        )
        for r in (3e-3, 1e-3)
    )
    for name, tensor in high.items():
        apart = (tensor - low[name]).abs().max().item()
        assert apart == pytest.approx(2e-3 if name.endswith(_TABLE) else 0, abs=2e-5), name


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    base = {**_FLAGS, **_DIST, "save_interval": 2, "ckpt_format": "torch_dist"}
    base["ultramem_value_lr_fixed"] = 3e-3

    def attempt(seed: int) -> tuple[Any, float]:
        flags = {**base, "seed": seed}
        run, closest_call = train_watched(2, tiny_gpt(**flags, save=tmp_path / str(seed)))
        return (flags, tmp_path / str(seed), run), closest_call

    flags, folder, uninterrupted = first_decided(attempt)
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    argv = tiny_gpt(**flags, load=folder, no_load_rng=True, tensor_model_parallel_size=2)
    resumed = train(2, argv)
    del uninterrupted.iterations[:2]
    assert_same_training(resumed, uninterrupted, gradients=False)
