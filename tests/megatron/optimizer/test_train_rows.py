"""Sparse memory finetuning: the rows that a batch chose move, and not a bit of anything else."""

from argparse import Namespace

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.ranks import RanksFailed
from tests.training_runs import tiny_gpt
from tests.whole_model import (
    STEADY,
    assert_same_training,
    first_decided,
    train,
    train_watched,
    whole,
)
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.background_reads import BackgroundReads, TableReads, sum_of_keys
from ultramem_megatron.megatron.flags.train_rows_flags import refuse_train_rows
from ultramem_megatron.megatron.optimizer.train_rows import move_touched_rows
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import memory_layers
from ultramem_megatron.memory.row_choice import choose_rows, rarity
from ultramem_megatron.memory.spans import Span

_VALUES, _ROWS, _BATCHES = 23 * 23, 6, 5
_MEMORY = {
    "num_layers": 4,
    "ultramem_spans": "1:2/3:4",
    "ultramem_num_keys": 23,
    "ultramem_topk": 4,
    "ultramem_value_dim": 16,
    "ultramem_query_conv_kernel": 3,
    "disable_bias_linear": True,
    "weight_decay": 0.5,
    "lr": 0.01,
    **STEADY,
}


def _background():
    generator = torch.Generator().manual_seed(3)
    reads = {n: torch.randint(0, 9, (_VALUES,), generator=generator) for n in (1, 3)}
    return BackgroundReads(
        _BATCHES, {n: TableReads(r, r.clamp(max=_BATCHES)) for n, r in reads.items()}
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    found = tmp_path_factory.mktemp("background") / "reads.npz"
    _background().write(found)
    return found


def _flags(file, **changes):
    rows = {"ultramem_train_rows": _ROWS, "ultramem_background_reads": file}
    return tiny_gpt(**{**_MEMORY, "ultramem_train_only": "memory", **rows, **changes})


_seen: list[dict[str, torch.Tensor]] = []


def _watch():
    """Keep reads and tables of each step as they are when its rows are chosen; buffers at first."""
    from ultramem_megatron.megatron.optimizer.train_rows import TrainedRows

    start, choose = TrainedRows.__init__, TrainedRows.choose

    def watched_start(self, layers, *rest):
        layers = list(layers)
        buffers = [(layer.layer_number, n, b) for layer in layers for n, b in layer.named_buffers()]
        _seen.append({f"{number} {name}": b.clone() for number, name, b in buffers})
        start(self, layers, *rest)

    def watched_choice(self):
        found = {}
        for number, layers in self.layers.items():
            found[f"reads {number}"] = layers[0].statistics.rows.clone()
            found[f"table {number}"] = layers[0].values.weight.detach().clone()
        _seen.append(found)
        choose(self)

    TrainedRows.__init__, TrainedRows.choose = watched_start, watched_choice


def _finish(trained):
    """What was seen, the memories' buffers, and Adam's moments, which are of tables alone."""
    from ultramem_megatron.memory.layer import memory_layers

    layers = [layer for chunk in trained.model for layer in memory_layers(chunk)]
    buffers = {f"{y.layer_number} {n}": b.clone() for y in layers for n, b in y.named_buffers()}
    (single,) = trained.optimizer.chained_optimizers
    state = single.optimizer.state.values()
    return _seen, buffers, [(s["exp_avg"].clone(), s["exp_avg_sq"].clone()) for s in state]


def test_only_the_rows_that_a_step_chose_move(file):
    (run,) = train(1, _flags(file), initial_parameters=True, before=_watch, on_finish=_finish).ranks
    (buffers, *seen), last_buffers, moments = run.finished
    background = _background()
    for number in (1, 3):
        (name,) = (n for n in run.parameters if f"layers.{number - 1}.memory.values" in n)
        tables = [found[f"table {number}"] for found in seen] + [run.parameters[name]]
        assert torch.equal(tables[0], run.initial_parameters.pop(name))
        weights = rarity(background.tables[number].batches, _BATCHES)
        for before, after, found in zip(tables[:-1], tables[1:], seen, strict=True):
            reads = found[f"reads {number}"]
            assert reads.sum() == 8 * 32 * 8  # 8 sequences of 32 tokens read 2 x 4 values each
            moved = (before != after).any(1).nonzero().flatten()
            assert torch.equal(moved, choose_rows(reads, weights, _ROWS))
            assert len(moved) == _ROWS
        ever = (tables[0] != tables[-1]).any(1)
        assert any(all(torch.equal((m != 0).any(1), ever) for m in pair) for pair in moments)
    assert len(run.initial_parameters) > 20
    for name, before in run.initial_parameters.items():
        assert torch.equal(run.parameters[name], before), name
    assert "1 query.common.mean" in buffers
    for name, before in buffers.items():
        assert torch.equal(last_buffers[name], before), name


def test_a_row_with_gradient_moves_as_under_sgd_and_the_others_not_at_all():
    pairs = []
    for _ in range(2):
        torch.manual_seed(5)
        table = torch.randn(7, 3, dtype=torch.float64).requires_grad_()
        sgd = torch.optim.SGD([table], lr=0.1, momentum=0.9, weight_decay=0.3)
        pairs.append((table, sgd))
    (dense, _), (lazy, optimizer) = pairs
    move_touched_rows(optimizer, [lazy])
    for rows in (range(7), (1, 4), (1, 4)):
        before, momentum = lazy.detach().clone(), optimizer.state[lazy].get("momentum_buffer")
        momentum = None if momentum is None else momentum.clone()
        grad = torch.zeros_like(before)
        grad[list(rows)] = torch.randn(len(rows), 3, dtype=torch.float64)
        for table, sgd in pairs:
            table.grad = grad.clone()
            sgd.step()
        assert_close(lazy[list(rows)], dense[list(rows)], rounding(torch.float64, 16))
    still = [0, 2, 3, 5, 6]
    assert torch.equal(lazy[still], before[still])
    assert torch.equal(optimizer.state[lazy]["momentum_buffer"][still], momentum[still])
    assert not torch.equal(dense[still], before[still])


def test_an_optimizer_that_moves_every_row_is_refused():
    table = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(UltraMemError, match=r"--ultramem-train-rows works .* is RMSprop"):
        move_touched_rows(torch.optim.RMSprop([table]), [table])


_DESIGN = UltraMemConfig(
    spans=(Span(1, 2), Span(3, 4)), num_keys=23, key_dim=16, value_dim=16, topk=4
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ultramem_train_rows": None}, r"reads\.npz is for --ultramem-train-rows T, which is not"),
        ({"ultramem_train_rows": 0}, "--ultramem-train-rows 0: it must be from 1 to 529"),
        ({"ultramem_train_rows": 530}, "--ultramem-train-rows 530: it must be from 1 to 529"),
        ({"ultramem_background_reads": None}, "Add --ultramem-background-reads FILE"),
        ({"ultramem_background_reads": "nowhere"}, "nowhere: No such file or directory"),
        ({"ultramem_train_only": None}, "Add --ultramem-train-only memory"),
        ({"ultramem_upcycle": "dense"}, "cannot be combined with --ultramem-upcycle"),
        ({"optimizer": "muon"}, "--optimizer muon cannot be combined .* Use one of adam, sgd"),
        ({"use_distributed_optimizer": True}, "--use-distributed-optimizer cannot be combined"),
    ],
)
def test_what_cannot_train_rows_is_refused(changes, message, file):
    given = {
        "ultramem_train_rows": _ROWS,
        "ultramem_background_reads": str(file),
        "ultramem_train_only": "memory",
        "ultramem_upcycle": None,
        "optimizer": "adam",
        "use_distributed_optimizer": False,
    }
    refuse_train_rows(Namespace(**given), _DESIGN)
    with pytest.raises(UltraMemError, match=message):
        refuse_train_rows(Namespace(**{**given, **changes}), _DESIGN)


_GO_ON = {"no_load_rng": True, "ckpt_format": "torch_dist", "lr_decay_style": "constant"}


@pytest.fixture(scope="module")
def start(file, tmp_path_factory):
    """Folder of a run after one step, its seed, and what one process makes of it from there."""

    def attempt(seed):
        folder = tmp_path_factory.mktemp(str(seed))
        train(1, _flags(file, seed=seed, save=folder, save_interval=1, **_GO_ON))
        (folder / "latest_checkpointed_iteration.txt").write_text("1")
        flags = _flags(file, seed=seed, load=folder, **_GO_ON)
        run, closest_call = train_watched(1, flags, gradients_at=2)
        return (folder, seed, run), closest_call

    return first_decided(attempt)


_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"micro_batch_size": 4}),
        (1, _RECOMPUTE),
        (2, {"ultramem_parallel_size": 1}),
        (2, {"ultramem_partition": "number"}),
        (2, {"ultramem_partition": "dimension", "overlap_grad_reduce": True}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tttL"}),
        (2, {"context_parallel_size": 2, "calculate_per_token_loss": True}),
        (4, {"tensor_model_parallel_size": 2, "ultramem_parallel_size": 2}),
    ],
)
def test_layouts_choose_and_move_the_same_rows(start, file, world_size, changes):
    folder, seed, expected = start
    flags = _flags(file, seed=seed, load=folder, **_GO_ON, **changes)
    run = train(world_size, flags, gradients_at=2)
    assert_same_training(run, expected)
    found, wanted = (whole(r, "gradients", "values.weight") for r in (run, expected))
    for name, gradient in wanted.items():
        rows = (gradient != 0).any(1)
        assert rows.sum() == _ROWS
        assert torch.equal((found[name] != 0).any(1), rows)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(file, tmp_path):
    folder = {"save": tmp_path, "load": tmp_path, "save_interval": 2, "load_or_start": True}
    flags = _flags(file, train_iters=4, ckpt_format="torch_dist", **folder)
    expected = train(1, flags)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train(1, flags)
    assert resumed.losses == expected.losses[2:]
    for name, parameter in expected.ranks[0].parameters.items():
        assert torch.equal(resumed.ranks[0].parameters[name], parameter), name
    without = {"ultramem_train_rows": None, "ultramem_background_reads": None}
    with pytest.raises(RanksFailed, match=r"saved it had --ultramem-train-rows, .* --finetune"):
        train(1, _flags(file, ckpt_format="torch_dist", **folder, **without))


def _sums(trained):
    layers = memory_layers(trained.model[0])
    return {layer.table_number: sum_of_keys([layer]) for layer in layers}


def test_reads_of_another_model_are_refused_before_a_step(tmp_path):
    """Its own, which training of rows does not make another's, are taken."""
    zeros = torch.zeros(_VALUES, dtype=torch.int64)
    file = tmp_path / "reads.npz"

    def written(sums):
        tables = {n: TableReads(zeros, zeros, sums.get(n)) for n in (1, 3)}
        BackgroundReads(1, tables).write(file)
        return _flags(file, ckpt_format="torch_dist")

    (run,) = train(1, written({}), on_finish=_sums).ranks
    (again,) = train(1, written(run.finished), on_finish=_sums).ranks
    assert again.finished == run.finished
    with pytest.raises(RanksFailed, match=r"another model: the keys of the table of layer 3 are"):
        train(1, written({**run.finished, 3: 7}))


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "tables", "values"),
    [
        ({"bf16": True}, (1, 3), _VALUES),
        ({"optimizer": "sgd", "lr": 1.0}, (1, 3), _VALUES),
        ({"ultramem_share_values": 2}, (1,), 2 * _VALUES),
        ({"ultramem_values": "prevalued", "ultramem_value_expansion": 1}, (1, 3), _VALUES),
    ],
)
def test_only_few_rows_of_other_kinds_move(changes, tables, values, tmp_path):
    zeros = torch.zeros(values, dtype=torch.int64)
    background = BackgroundReads(1, dict.fromkeys(tables, TableReads(zeros, zeros)))
    background.write(tmp_path / "reads.npz")
    flags = _flags(tmp_path / "reads.npz", **changes)
    (run,) = train(1, flags, initial_parameters=True).ranks
    found = []
    for name, before in run.initial_parameters.items():
        after = run.parameters[name]
        if len(before) == values:
            found.append(name)
            assert 0 < (after != before).any(1).sum() <= 3 * _ROWS, name
        else:
            assert torch.equal(after, before), name
    assert len(found) == len(tables) * (2 if "ultramem_values" in changes else 1)
