"""The distributed optimizer with torch's Adam: each defect exists upstream, and is mended.

If a test here named `..._upstream` fails with a newer Megatron, the patch can be deleted.
"""

from typing import Any

import pytest

from tests.ranks import RanksFailed, run_on_ranks
from tests.training_runs import Trained, TrainingRun, run_pretrain, tiny_gpt
from ultramem_megatron.patches.registry import PATCH_MODULES

_FORMATS: dict[str, dict[str, Any]] = {
    "dp_reshardable": {},
    "fully_reshardable": {"dist_ckpt_optim_fully_reshardable": True},
}


def _flags(**changes: Any) -> list[str]:
    return tiny_gpt(train_iters=4, use_distributed_optimizer=True, **changes)


def _adam_steps(trained: Trained) -> list[float]:
    inner = trained.optimizer.chained_optimizers[0].optimizer
    return sorted({float(state["step"]) for state in inner.state.values()})


@pytest.fixture(scope="module", params=list(_FORMATS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Format, folder of a checkpoint of iteration 2, and the run that was not interrupted."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = _FORMATS[request.param]
    run_pretrain(1, _flags(save=folder, save_interval=2, exit_interval=2, **changes))
    return request.param, folder, run_pretrain(1, _flags(**changes), on_finish=_adam_steps)


def _resume(saved: Any, without: str | None = None) -> TrainingRun:
    name, folder, _ = saved
    patches = [patch for patch in PATCH_MODULES if patch != without]
    flags = _flags(load=folder, **_FORMATS[name])
    return run_pretrain(1, flags, on_finish=_adam_steps, patches=patches)


def test_a_resumed_run_equals_the_uninterrupted_one(saved: Any) -> None:
    _, _, uninterrupted = saved
    resumed = _resume(saved)
    assert resumed.losses == uninterrupted.losses[2:]
    assert resumed.grad_norms == uninterrupted.grad_norms[2:]
    assert resumed.ranks[0].finished == uninterrupted.ranks[0].finished == [4.0]


def test_initial_state_fails_upstream(saved: Any) -> None:
    with pytest.raises(RanksFailed, match=r"assert len\(steps\) == 1"):
        _resume(saved, without="defects.distopt_initial_state")


def test_step_is_missing_or_lost_upstream(saved: Any) -> None:
    if saved[0] == "fully_reshardable":
        with pytest.raises(RanksFailed, match="KeyError: 'step'"):
            _resume(saved, without="defects.distopt_missing_step")
    else:
        resumed = _resume(saved, without="defects.distopt_missing_step")
        assert resumed.ranks[0].finished == [2.0]  # counted from 0 again


def test_step_is_shared_upstream(saved: Any) -> None:
    resumed = _resume(saved, without="defects.distopt_shared_step")
    assert resumed.ranks[0].finished[0] > 4.0  # one count per parameter


def test_loading_with_autograd_fails_upstream(saved: Any) -> None:
    if saved[0] == "fully_reshardable":  # its loader turns autograd off itself
        assert _resume(saved, without="defects.distopt_load_without_grad").ranks
        return
    with pytest.raises(RanksFailed, match="a view of a leaf Variable that requires grad"):
        _resume(saved, without="defects.distopt_load_without_grad")


def _steps_of_a_rank_without_parameters() -> tuple[float, float, bool]:
    """Counts in the state of an optimizer whose shard is empty: fresh, and after loading 7."""
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from ultramem_megatron.patches import registry

    registry.apply_all()
    optimizer: Any = DistributedOptimizer.__new__(DistributedOptimizer)
    optimizer.optimizer = torch.optim.AdamW([{"params": []}])
    optimizer.grad_scaler = None
    fresh = optimizer.state_dict()["optimizer"]["param_groups"][0]["step"]
    optimizer._ultramem_num_steps = 7
    later = optimizer.state_dict()["optimizer"]["param_groups"][0]["step"]
    return fresh, later, len(optimizer.optimizer.state) == 0


def test_a_rank_without_parameters_saves_the_number_of_steps() -> None:
    assert run_on_ranks(1, _steps_of_a_rank_without_parameters) == [(0.0, 7.0, True)]


_SMALL_BUCKETS = {"overlap_grad_reduce": True, "ddp_bucket_size": 1, "global_batch_size": 4}


def test_a_rank_may_have_nothing_of_a_bucket(tmp_path: Any) -> None:
    """A norm's 16 numbers in a bucket of their own: padded to 128, of which the other has 64."""
    saving = {"save": tmp_path, "save_interval": 2, "exit_interval": 2}
    whole = run_pretrain(2, _flags(**_SMALL_BUCKETS))
    run_pretrain(2, _flags(**_SMALL_BUCKETS, **saving))
    resumed = run_pretrain(2, _flags(**_SMALL_BUCKETS, load=tmp_path))
    assert resumed.losses == whole.losses[2:]
    assert resumed.grad_norms == whole.grad_norms[2:]


def test_a_rank_with_nothing_of_a_bucket_fails_upstream(tmp_path: Any) -> None:
    patches = [patch for patch in PATCH_MODULES if patch != "defects.distopt_empty_shard"]
    with pytest.raises(RanksFailed, match="empty bucket encountered"):
        run_pretrain(2, _flags(**_SMALL_BUCKETS, save=tmp_path, save_interval=2), patches=patches)
