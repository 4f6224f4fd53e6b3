"""A GPT without memory layers, trained by Megatron's own `pretrain()` on the CPU."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import RanksFailed, run_on_ranks
from tests.training_runs import RankRun, Trained, TrainingRun, run_pretrain, tiny_gpt
from ultramem_megatron.patches.registry import PATCH_MODULES

_ROUNDING = "defects.fused_adam"
"""The one patch beyond the CPU whose results are the same to rounding only."""
_CPU_PATCHES = tuple(
    name
    for name in PATCH_MODULES
    if (name.startswith("cpu.") and name != "cpu.jit_warmup") or name == _ROUNDING
)
_RELATIVE_TOLERANCE = 2e-6
"""Other orders of summation in float32: a few units in the last place of a loss near 6."""


@pytest.fixture(scope="module")
def one_rank() -> TrainingRun:
    """The run everything else is compared with."""
    return run_pretrain(1, tiny_gpt(), gradients_at=1, initial_parameters=True, parameters=True)


def _assert_same_training(run: TrainingRun, reference: TrainingRun, skip: int = 0) -> None:
    expected = reference.iterations[skip:]
    assert [record["iteration"] for record in run.iterations] == [
        record["iteration"] for record in expected
    ]
    for name in ("lm loss", "grad_norm", "learning_rate"):
        values = [record[name] for record in run.iterations]
        assert values == pytest.approx(
            [record[name] for record in expected], rel=_RELATIVE_TOLERANCE
        ), name


def _assert_close_gradients(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < _RELATIVE_TOLERANCE, name


def test_it_learns(one_rank: TrainingRun) -> None:
    assert len(one_rank.losses) == 3
    assert one_rank.losses[0] > one_rank.losses[1] > one_rank.losses[2]
    assert all(norm > 0.1 for norm in one_rank.grad_norms)


def test_a_repeated_run_is_identical(one_rank: TrainingRun) -> None:
    again = run_pretrain(1, tiny_gpt(), parameters=True)
    assert again.iterations == one_rank.iterations
    for name, value in one_rank.ranks[0].parameters.items():
        assert torch.equal(again.ranks[0].parameters[name], value), name


def test_patches_beyond_the_cpu_change_nothing() -> None:
    runs = [
        run_pretrain(1, tiny_gpt(), gradients_at=3, parameters=True, patches=patches)
        for patches in ([*_CPU_PATCHES, "defects.dataset_helpers"], None)
    ]
    # The warm-up that cpu.jit_warmup removes shifts the initial weights, so start from equal ones.
    assert runs[0].iterations != runs[1].iterations
    few, all_patches = (
        run_pretrain(1, tiny_gpt(), gradients_at=3, parameters=True, patches=patches)
        for patches in ([*_CPU_PATCHES, "defects.dataset_helpers", "cpu.jit_warmup"], None)
    )
    assert few.iterations == all_patches.iterations
    for kind in ("gradients", "parameters"):
        mine, theirs = getattr(few.ranks[0], kind), getattr(all_patches.ranks[0], kind)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), kind


def test_without_the_helper_patch_megatron_exits() -> None:
    patches = [name for name in PATCH_MODULES if name != "defects.dataset_helpers"]
    with pytest.raises(RanksFailed, match=r"Failed to compile the C\+\+ dataset helper"):
        run_pretrain(1, tiny_gpt(), patches=patches)


def test_without_the_initialize_patch_megatron_wants_cuda() -> None:
    patches = [name for name in PATCH_MODULES if name != "cpu.initialize"]
    with pytest.raises(RanksFailed, match="Megatron requires CUDA"):
        run_pretrain(1, tiny_gpt(), patches=patches)


def _initial(world_size: int, without: Sequence[str] = (), **changes: Any) -> list[RankRun]:
    patches = [name for name in PATCH_MODULES if name not in without]
    flags = tiny_gpt(train_iters=1, **changes)
    return run_pretrain(world_size, flags, initial_parameters=True, patches=patches).ranks


def test_initial_weights_do_not_depend_on_the_micro_batch(one_rank: TrainingRun) -> None:
    expected = one_rank.ranks[0].initial_parameters
    [other] = _initial(1, micro_batch_size=1)
    assert all(torch.equal(other.initial_parameters[name], expected[name]) for name in expected)
    # Upstream they do.
    [upstream] = _initial(1, without=["cpu.jit_warmup"], micro_batch_size=1)
    assert not all(
        torch.equal(upstream.initial_parameters[name], expected[name]) for name in expected
    )


def test_initial_weights_do_not_depend_on_tensor_parallelism(one_rank: TrainingRun) -> None:
    ranks = _initial(2, tensor_model_parallel_size=2)
    cut = 0
    for name, whole in one_rank.ranks[0].initial_parameters.items():
        shards = [rank.initial_parameters[name] for rank in ranks]
        differing = [d for d in range(whole.dim()) if shards[0].shape[d] != whole.shape[d]]
        if differing:
            cut += 1
            assert torch.equal(torch.cat(shards, dim=differing[0]), whole), name
        else:
            assert all(torch.equal(shard, whole) for shard in shards), name
    # Embedding, output layer, and per layer: qkv and fc1 with bias, projection and fc2.
    assert cut == 2 + 2 * 6


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {}),
        (2, {"use_distributed_optimizer": True}),
        (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True}),
        (1, {"micro_batch_size": 1}),
        (1, {"calculate_per_token_loss": True}),
        (
            1,
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
        ),
    ],
    ids=str,
)
def test_training_does_not_depend_on_how_the_batch_is_cut(
    one_rank: TrainingRun, world_size: int, changes: dict[str, Any]
) -> None:
    run = run_pretrain(world_size, tiny_gpt(**changes), gradients_at=1)
    _assert_same_training(run, one_rank)
    if "use_distributed_optimizer" not in changes and "calculate_per_token_loss" not in changes:
        _assert_close_gradients(run.ranks[0].gradients, one_rank.ranks[0].gradients)


def test_tensor_parallel_training_equals_one_rank(one_rank: TrainingRun) -> None:
    _assert_same_training(run_pretrain(2, tiny_gpt(tensor_model_parallel_size=2)), one_rank)


_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "1 rank, distributed optimizer": (1, {"use_distributed_optimizer": True}),
    "DP2, distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2, virtual stages": (
        2,
        {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    ),
}


def _resumable(**changes: Any) -> list[str]:
    fully = {"dist_ckpt_optim_fully_reshardable": "use_distributed_optimizer" in changes}
    return tiny_gpt(num_layers=4, train_iters=4, **fully, **changes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], TrainingRun]:
    """Checkpoints of iteration 2 by kind of optimizer, and the uninterrupted run."""
    folders = {}
    for kind in ("plain", "distributed"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        changes = {"use_distributed_optimizer": True} if kind == "distributed" else {}
        run_pretrain(1, _resumable(save=folders[kind], save_interval=2, exit_interval=2, **changes))
    return folders, run_pretrain(1, _resumable())


@pytest.mark.parametrize("layout", list(_LAYOUTS))
def test_a_checkpoint_of_one_rank_resumes_in_any_layout(
    checkpoint: tuple[dict[str, Path], TrainingRun], layout: str
) -> None:
    folders, uninterrupted = checkpoint
    world_size, changes = _LAYOUTS[layout]
    kind = "distributed" if "use_distributed_optimizer" in changes else "plain"
    # Random states are kept per rank, and nothing here is random after the initial weights.
    run = run_pretrain(world_size, _resumable(load=folders[kind], no_load_rng=True, **changes))
    _assert_same_training(run, uninterrupted, skip=2)
    if world_size == 1:
        assert run.losses == uninterrupted.losses[2:]


@pytest.mark.parametrize(
    "second_use", [{"untie_embeddings_and_output_weights": False}, {"mtp_num_layers": 1}], ids=str
)
def test_an_embedding_used_on_the_last_stage_too_stays_one(
    tmp_path: Path, second_use: dict[str, Any]
) -> None:
    """Tied output weights and multi-token prediction put a copy of it on the last stage."""

    def flags(**changes: Any) -> list[str]:
        return tiny_gpt(train_iters=4, **second_use, **changes)

    uninterrupted = run_pretrain(1, flags())
    run_pretrain(1, flags(save=tmp_path, save_interval=2, exit_interval=2))
    pipelined = flags(load=tmp_path, no_load_rng=True, pipeline_model_parallel_size=2)
    _assert_same_training(run_pretrain(2, pipelined), uninterrupted, skip=2)


@pytest.mark.parametrize("distributed", [False, True])
def test_bfloat16_resumes_to_the_same_numbers(tmp_path: Path, distributed: bool) -> None:
    def flags(**changes: Any) -> list[str]:
        return tiny_gpt(train_iters=4, bf16=True, use_distributed_optimizer=distributed, **changes)

    uninterrupted = run_pretrain(2, flags())
    run_pretrain(2, flags(save=tmp_path, save_interval=2, exit_interval=2))
    resumed = run_pretrain(2, flags(load=tmp_path))
    assert resumed.losses == uninterrupted.losses[2:]
    assert resumed.grad_norms == uninterrupted.grad_norms[2:]
    assert resumed.losses[1] < resumed.losses[0]


def test_dropout_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    def flags(**changes: Any) -> list[str]:
        return tiny_gpt(train_iters=4, hidden_dropout=0.1, attention_dropout=0.1, **changes)

    uninterrupted = run_pretrain(1, flags())
    run_pretrain(1, flags(save=tmp_path, save_interval=2, exit_interval=2))
    assert run_pretrain(1, flags(load=tmp_path)).losses == uninterrupted.losses[2:]
    # Without the random states it would not: dropout is at work.
    other = run_pretrain(1, flags(load=tmp_path, no_load_rng=True))
    assert other.losses != uninterrupted.losses[2:]


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(RanksFailed, match=r"the loss of this rank is (NaN|infinite)"):
        run_pretrain(1, tiny_gpt(init_method_std=1e6, lr=1e5, clip_grad=0, train_iters=6))


def _pretrain_without_launcher(argv: list[str]) -> dict[str, str]:
    from ultramem_megatron.training.pretrain import main

    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    for name in (*launched, "MASTER_PORT"):
        del os.environ[name]
    main(argv)
    return {name: os.environ[name] for name in launched}


def test_it_runs_without_torchrun() -> None:
    [environment] = run_on_ranks(1, _pretrain_without_launcher, tiny_gpt(train_iters=1))
    assert environment == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }


_EOD = 511  # NullTokenizer's, for tiny_gpt's vocabulary of 512
_DOCUMENT_LENGTHS = (5, 40, 7, 100, 3, 60)


def _write_documents(prefix: str) -> None:
    """Megatron's indexed files of documents that count upwards and end with _EOD."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for length in _DOCUMENT_LENGTHS * 4:
        tokens = [*range(1, length), _EOD]
        builder.add_document(torch.tensor(tokens), [length])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture(scope="module")
def data_prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = str(tmp_path_factory.mktemp("data") / "documents")
    run_on_ranks(1, _write_documents, prefix)
    return prefix


def _first_batch(trained: Trained) -> dict[str, torch.Tensor]:
    """One micro-batch, as `get_batch` makes it from the training data."""
    from megatron.core.utils import get_model_config
    from megatron.training.training import build_train_valid_test_data_iterators

    from ultramem_megatron.training.gpt_batches import get_batch
    from ultramem_megatron.training.gpt_datasets import train_valid_test_datasets_provider

    iterators = build_train_valid_test_data_iterators(train_valid_test_datasets_provider)
    batch = get_batch(iterators[0], get_model_config(trained.model[0]))
    return {key: value for key, value in batch.items() if value is not None}


def _read(prefix: str, **changes: Any) -> TrainingRun:
    flags = tiny_gpt(mock_data=False, train_iters=1, data_path=[prefix], split="90,10,0", **changes)
    return run_pretrain(1, flags, on_finish=_first_batch)


def test_batches_hold_shifted_labels_and_plain_masks(data_prefix: str) -> None:
    run = _read(data_prefix)
    batch = run.ranks[0].finished
    assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids", "attention_mask"}
    assert torch.equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
    assert batch["loss_mask"].min() == 1.0
    assert torch.equal(batch["position_ids"][0], torch.arange(32))
    causal = torch.ones(32, 32).triu(1).bool()
    assert torch.equal(batch["attention_mask"][0, 0], causal)


def test_flags_about_documents_reach_the_batches(data_prefix: str) -> None:
    changes = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    run = _read(data_prefix, **changes)
    batch = run.ranks[0].finished
    ends = batch["tokens"] == _EOD
    assert ends.any()
    # A document's end predicts nothing; the next token starts counting at 0 and sees no past.
    assert torch.equal(batch["loss_mask"] == 0.0, ends)
    starts = torch.roll(ends, 1, dims=1)
    starts[:, 0] = True
    assert torch.equal(batch["position_ids"] == 0, starts)
    sample, start = [int(i) for i in (starts & (torch.arange(32) > 0)).nonzero()[0]]
    assert batch["attention_mask"][sample, 0, start, :start].all()
    assert not batch["attention_mask"][sample, 0, start, start]
    assert run.losses != _read(data_prefix).losses


def test_a_foreign_task_is_refused_by_flag() -> None:
    with pytest.raises(RanksFailed, match=r"--fim-data is not supported .* remove the flag"):
        run_pretrain(1, tiny_gpt(mock_data=False, data_path=["nowhere"], fim_data=True))
