"""Of more than 64 ranks, the default cut of tables follows the batch: no run resumes wrongly by it.

Weights, and states without the distributed optimizer, load into any cut (test_table_parallelism);
what could load as wrong moments is refused, and the refusal names the flags of the cut before.
"""

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.checkpoint import optimizer_layout
from ultramem_megatron.megatron.checkpoint.source import Source
from ultramem_megatron.megatron.flags.table_flags import settings_from_args
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import Span

_DESIGN = UltraMemConfig(spans=(Span(1, 2), Span(3, 4)), num_keys=1024, key_dim=64, value_dim=1024)


def _args(global_batch_size: int, **changes: object) -> Namespace:
    flags = {
        "ultramem_node_size": 8,
        "ultramem_parallel_size": None,
        "ultramem_partition": None,
        "world_size": 512,
        "pipeline_model_parallel_size": 1,
        "tensor_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "num_experts": None,
        "params_dtype": torch.bfloat16,
        "global_batch_size": global_batch_size,
        "seq_length": 2048,
        "use_tp_pp_dp_mapping": False,
        "num_distributed_optimizer_instances": 1,
        "no_load_optim": False,
        "finetune": False,
        "optimizer": "adam",
        "muon_tp_mode": "blockwise",
        "ultramem_train_rows": None,
        "use_distributed_optimizer": True,
        "use_layer_wise_distributed_optimizer": False,
        **changes,
    }
    return Namespace(**flags)


@pytest.fixture
def resume(monkeypatch: pytest.MonkeyPatch):
    """Checks a run with a batch eight times as large against a checkpoint of 512 sequences."""
    before = settings_from_args(_args(512), _DESIGN)

    def check(kind: str | None = "dp_reshardable", **changes: object) -> None:
        fakes = {
            "is_torch_dist": lambda _: True,
            "stored_layout": lambda _: Namespace(),
            "_kind": lambda _: kind,
            "_saved_parts": lambda *_: before.kind.parts(before.size, before.node),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(optimizer_layout, name, fake)
        monkeypatch.setattr(Source, "iteration", lambda _: Path("iter_0000002"))
        args = _args(4096, **changes)
        here = settings_from_args(args, _DESIGN)
        if "ultramem_parallel_size" not in changes:
            assert here.size != before.size
        optimizer_layout.check_optimizer_layout(Source("--load", "x", None), args, _DESIGN, here)

    return check


def test_a_state_that_cannot_follow_is_refused_with_the_flags_of_the_cut_before(resume):
    with pytest.raises(
        UltraMemError, match="state of its distributed optimizer cannot follow"
    ) as e:
        resume()
    words = re.findall(r"\((--ultramem-parallel-size \d+ [^)]*)\)", str(e.value))[0].split()
    given = dict(zip((word[2:].replace("-", "_") for word in words[::2]), words[1::2], strict=True))
    numbers = {name: int(given[name]) for name in given if name != "ultramem_partition"}
    resume(**{**given, **numbers})


@pytest.mark.parametrize(
    "changes",
    [
        {"use_distributed_optimizer": False, "kind": None},
        {"kind": "fully_reshardable"},
        {"no_load_optim": True},
        {"finetune": True},
    ],
)
def test_what_loads_into_any_cut_is_not_refused(changes, resume):
    resume(**changes)
