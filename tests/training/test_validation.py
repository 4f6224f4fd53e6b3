"""Validation gives one rank's losses in every layout, whatever it is cut into."""

from typing import Any

import numpy as np
import pytest

from tests.ranks import RanksFailed
from tests.training_runs import Trained, run_pretrain, tiny_gpt
from tests.whole_model import AFTER_STEPS
from ultramem_megatron.data import indexed

_MEMORY = {"ultramem_spans": "1:2", "ultramem_num_keys": 12, "ultramem_topk": 6}
_TP = {"tensor_model_parallel_size": 2}
_found: list[float] = []
"""Losses of the validations of this rank's process."""


def _keep() -> None:
    from megatron.training import training

    evaluate = training.evaluate

    def kept(*args: Any, **kwargs: Any) -> Any:
        found = evaluate(*args, **kwargs)
        _found.extend(float(loss) for loss in found[0].values())
        return found

    training.evaluate = kept


def _kept(_: Trained) -> list[float]:
    return _found


def _validated(world_size: int, **flags: Any) -> list[float]:
    words = tiny_gpt(**_MEMORY, **{"train_iters": 2, "eval_interval": 2, **flags})
    found: list[float] = (
        run_pretrain(world_size, words, before=_keep, on_finish=_kept).ranks[-1].finished
    )
    return found


def test_micro_batches_of_its_own_size_reach_all_tensor_parallel_ranks() -> None:
    smaller = {"eval_iters": 1, "eval_micro_batch_size": 1}
    expected = _validated(1, **smaller)
    assert len(expected) == 3
    assert _validated(2, **smaller, **_TP) == pytest.approx(expected, rel=AFTER_STEPS)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two validation sets, of 8 and 4 sequences, beside one to train on."""
    folder = tmp_path_factory.mktemp("sets")
    generator = np.random.default_rng(0)
    for name, sequences in (("train", 40), ("one", 8), ("two", 4)):
        document = generator.integers(0, 512, 32 * sequences + 1).tolist()
        indexed.write(folder / name, [document], 512)
    return {
        "mock_data": None,
        "train_data_path": folder / "train",
        "valid_data_path": [folder / "one", folder / "two"],
        "full_validation": True,
        "multiple_validation_sets": True,
    }


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(2, {}, id="DP2"),
        pytest.param(2, {**_TP, "eval_micro_batch_size": 1}, id="TP2"),
        pytest.param(2, {"ultramem_table_memory": "host"}, id="tables on the host"),
        pytest.param(2, {"ultramem_row_adam": True}, id="row Adam"),
    ],
)
@pytest.mark.long
def test_sets_are_evaluated_as_wholes(
    sets: dict[str, Any], world_size: int, layout: dict[str, Any]
) -> None:
    expected = _validated(1, **sets)
    assert len(expected) == 4
    assert _validated(world_size, **sets, **layout) == pytest.approx(expected, rel=AFTER_STEPS)


@pytest.mark.long
def test_wholes_in_larger_batches_over_tensor_parallel_ranks_are_refused(
    sets: dict[str, Any],
) -> None:
    with pytest.raises(RanksFailed, match=r"--eval-micro-batch-size 2 \(by default --micro-batch"):
        _validated(2, **sets, **_TP)
