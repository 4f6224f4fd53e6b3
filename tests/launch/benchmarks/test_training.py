"""The training benchmark: fair models, what a run records, and what is written of it."""

import csv

import pytest

from launch.benchmarks import training
from launch.benchmarks.training_models import SCALES, Scale
from tests.ranks import run_on_ranks
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.rows import write


def _sizes_of_all():
    return {
        name: {
            model: (size.flops_per_token, size.total)
            for model, size in training.check_equal(scale).items()
        }
        for name, scale in SCALES.items()
    }


def _unequal():
    models = dict(SCALES["tiny"].models)
    models["dense"] = (*models["dense"], "--ffn-hidden-size", "200")
    with pytest.raises(AssertionError, match="flops_per_token"):
        training.check_equal(Scale(models, SCALES["tiny"].common))


def _recorded(steps):
    from launch.benchmarks.training_steps import record

    scale = SCALES["tiny"]
    return record([*scale.common, *scale.models["ultramem"], "--train-iters", str(steps)])


def test_models_of_a_scale_do_equal_work():
    (sizes,) = run_on_ranks(1, _sizes_of_all)
    # Against the paper: 151m has 0.35 GFLOPs per token (table 1), MoE and UltraMem 2.04 and 2.03 B.
    assert {round(flops / 1e9, 2) for flops, _ in sizes["151m"].values()} == {0.35}
    assert round(sizes["151m"]["moe"][1] / 1e9, 2) == 2.04
    assert round(sizes["151m"]["ultramem"][1] / 1e9, 2) == 2.03
    for scale in sizes.values():
        assert scale.keys() == {"dense", "moe", "pkm", "ultramem"}


def test_an_unfair_comparison_is_not_timed():
    run_on_ranks(1, _unequal)


def test_a_run_records_every_step_and_the_optimizers_share():
    (found,) = run_on_ranks(1, _recorded, 4)
    assert len(found["step"]) == len(found["optimizer"]) == 4
    for step, optimizer in zip(found["step"], found["optimizer"], strict=True):
        assert 0 < optimizer < step < 60
    assert found["peak_bytes"] > 2**20


def test_rows_are_medians_without_warm_up_and_say_on_what_they_were_taken(tmp_path, monkeypatch):
    sizes = {
        model: type("Sizes", (), {"total": 10 * n, "flops_per_token": 7})
        for n, model in enumerate(SCALES["tiny"].models, start=1)
    }
    monkeypatch.setattr(training, "check_equal", lambda scale: sizes)
    ran = []

    def run(flags, steps):
        assert steps == 3
        ran.append(flags)
        slow = len(ran)  # 1..4 in the first round, 5..8 in the second
        return {
            "step": [99.0] * 3 + [slow, slow + 0.5, slow + 1.0],
            "optimizer": [99.0] * 3 + [0.25] * 3,
            "peak_bytes": slow,
        }

    monkeypatch.setattr(training, "_seconds", run)
    made = training.measure(SCALES["tiny"], "tiny", 3, 2)
    rows = [next(made)]
    assert len(ran) == 5  # there before the others have run
    rows += made
    assert [row["model"] for row in rows] == ["dense", "moe", "pkm", "ultramem"]
    dense, moe = rows[:2]
    # Steps 1, 1.5, 2, 5, 5.5, 6 seconds, of 2 x 32 tokens.
    assert (dense["step_ms"], dense["steps"], dense["optimizer_ms"]) == (3500, 6, 250)
    assert dense["tokens_per_second"] == round(64 / 3.5, 1)
    assert (dense["times_dense"], moe["times_dense"]) == (1, pytest.approx(3.5 / 4.5, abs=2e-3))
    assert dense["peak_bytes"] == 5
    write(tmp_path / "training.csv", rows)
    training.main(["--plot", str(tmp_path / "training.csv")])
    assert (tmp_path / "training.png").stat().st_size > 1000
    with (tmp_path / "training.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert {"hardware", "commit", "torch", "megatron_core"} <= written[0].keys()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "Give one of --out DIR"),
        ("--out x --steps 0", "--steps is 0; it must be at least 1"),
        ("--out x --steps 1 --rounds 1", "time at least two steps"),
    ],
)
def test_wrong_flags_are_refused(argv, message):
    with pytest.raises(UltraMemError, match=message):
        training.main(argv.split())


def test_a_csv_of_something_else_is_not_drawn(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UltraMemError, match=r"no rows of this kind\..*ultramem bench training "):
        training.main(["--plot", str(tmp_path / "other.csv")])
