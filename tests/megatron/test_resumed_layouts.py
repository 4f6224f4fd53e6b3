"""A checkpoint of any layout goes on in any other with the same losses, for each optimizer."""

from typing import Any

import pytest

from tests.training_runs import run_pretrain, tiny_gpt

_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "data": (2, {}),
    "rows": (2, {"ultramem_partition": "number"}),
    "whole tables": (2, {"ultramem_parallel_size": 1}),
    "tensor": (2, {"tensor_model_parallel_size": 2}),
    "pipeline": (2, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tL"}),
}
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {},
    "lazy adam": {"ultramem_lazy_adam": True},
    "distributed": {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True},
}
_DIGITS = 2e-5


def _flags(optimizer, layout, **changes):
    return tiny_gpt(
        **{
            "ultramem_spans": "1:2",
            "ultramem_num_keys": 12,
            "ultramem_topk": 6,
            "ckpt_format": "torch_dist",
            "train_iters": 4,
            "save_interval": 2,
            **_OPTIMIZERS[optimizer],
            **layout,
            **changes,
        }
    )


@pytest.mark.long
@pytest.mark.parametrize("before", ["one rank", "data"])
@pytest.mark.parametrize("optimizer", _OPTIMIZERS)
def test_it_goes_on_in_any_other(optimizer, before, tmp_path):
    ranks, layout = _LAYOUTS[before]
    losses = run_pretrain(ranks, _flags(optimizer, layout, save=tmp_path)).losses
    for ranks, layout in _LAYOUTS.values():
        again = run_pretrain(ranks, _flags(optimizer, layout, load=tmp_path, ckpt_step=2)).losses
        assert again == pytest.approx(losses[2:], abs=_DIGITS)
