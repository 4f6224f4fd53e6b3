"""A checkpoint of any layout goes on in any other with the same losses, for each optimizer.

Or it is refused by name before anything is built, where the optimizer's state cannot follow.
SOAP, adaptive Muon and what needs Transformer Engine (precision-aware, offloaded) are refused
before they could save (tests/megatron/flags).
"""

from typing import Any

import pytest

from tests.ranks import RanksFailed
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
    "row adam": {"ultramem_row_adam": True},
    "distributed": {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True},
    "distributed by ranks": {"use_distributed_optimizer": True},
    "adam bf16": {"bf16": True},
    "lion": {"optimizer": "lion"},
    "muon": {"optimizer": "muon"},
    "muon duplicated": {"optimizer": "muon", "muon_tp_mode": "duplicated"},
    "muon bf16": {"optimizer": "muon", "muon_tp_mode": "duplicated", "bf16": True},
    "layer-wise muon": {"optimizer": "dist_muon", "muon_tp_mode": "duplicated", "bf16": True},
    "layer-wise lion": {"optimizer": "lion", "use_distributed_optimizer": True, "bf16": True},
}
_DIGITS, _BF16_DIGITS = 2e-5, 1e-3
_REFUSED = {
    ("distributed by ranks", "one rank"): ("data", "rows", "tensor", "pipeline"),
    ("distributed by ranks", "data"): ("one rank", "rows", "whole tables", "tensor", "pipeline"),
    ("muon", "one rank"): ("tensor",),
    ("muon", "data"): ("tensor",),
}
"""Optimizer and layout that saved -> layouts that its state cannot follow to."""


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
def test_it_goes_on_in_any_other_or_is_refused(optimizer, before, tmp_path):
    ranks, layout = _LAYOUTS[before]
    losses = run_pretrain(ranks, _flags(optimizer, layout, save=tmp_path)).losses
    digits = _BF16_DIGITS if "bf16" in _OPTIMIZERS[optimizer] else _DIGITS
    for name, (ranks, layout) in _LAYOUTS.items():
        flags = _flags(optimizer, layout, load=tmp_path, ckpt_step=2)
        if name in _REFUSED.get((optimizer, before), ()):
            with pytest.raises(RanksFailed, match=f"--load {tmp_path}: .*--no-load-optim"):
                run_pretrain(ranks, flags)
        else:
            again = run_pretrain(ranks, flags).losses
            assert again == pytest.approx(losses[2:], abs=digits)
