"""Metrics of memory layers: on the console, in TensorBoard, with the right numbers."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.closeness import rounding
from tests.layers import small_layer
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.megatron.metrics import METRICS, collapse_warning
from ultramem_megatron.megatron.optimizer.value_learning_rate import value_lr_factor

# TensorBoard keeps float32: two numbers, each rounded once, and a product of them.
LOGGED = rounding(torch.float32, 2)
_FLAGS = {
    "num_layers": 4,
    "ultramem_spans": "1:2/3:4",
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
    "ultramem_aux_loss_margin": 0.05,
    "ultramem_value_lr_mult": 10.0,
    "train_iters": 4,
    "log_interval": 2,
    "tensorboard_log_interval": 1,
}


def _scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def _train(folder, world_size=1, **changes):
    run_pretrain(world_size, tiny_gpt(**{**_FLAGS, **changes}, tensorboard_dir=folder))
    return _scalars(folder)


@pytest.fixture(scope="module")
def scalars(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("events"))


def test_every_metric_of_every_memory_is_there(scalars):
    for layer in (1, 3):
        for name in METRICS:
            tag = f"ultramem/{name.replace(' ', '-')}/layer-{layer:03d}"
            assert sorted(scalars[tag]) == [2, 4], tag
            assert all(math.isfinite(value) for value in scalars[tag].values()), tag


def test_values_are_plausible(scalars):
    def at_end(name, layer=1):
        return scalars[f"ultramem/{name}/layer-{layer:03d}"][4]

    assert at_end("top-1-score") > at_end("top-m-score") > 0.3
    assert at_end("lambda-1") > at_end("lambda-2") > 0
    assert 0.5 < at_end("values-used") <= 1
    assert -1 < at_end("query-cosine") < 1
    assert 0 < at_end("usage-KL") < math.log(144)
    assert at_end("output-std") > 0
    # The mean over heads of the squares is at least the square of the mean.
    assert at_end("aux-loss") >= 0.001 * max(0.0, at_end("lambda-2") - 0.05) ** 2 > 0


def test_value_learning_rate_falls_from_ten_times_to_the_base_rate(scalars):
    rates, base = scalars["ultramem/value-learning-rate"], scalars["learning-rate"]
    for step in (2, 4):
        expected = base[step] * value_lr_factor(10, step / 4, 1)
        assert rates[step] == pytest.approx(expected, rel=LOGGED)


def test_recomputation_is_not_counted_twice(scalars, tmp_path):
    again = _train(
        tmp_path, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    for tag in (tag for tag in scalars if tag.startswith("ultramem/")):
        assert again[tag] == scalars[tag], tag


def test_ranks_are_averaged(scalars, tmp_path):
    parallel = _train(tmp_path, world_size=2)
    for tag in (tag for tag in scalars if tag.startswith("ultramem/")):
        # The std over each half of the tokens is not the std over all.
        tolerance = 0.05 if "std" in tag else 2e-3
        for step, value in scalars[tag].items():
            assert parallel[tag][step] == pytest.approx(value, rel=tolerance), (tag, step)


def test_console_has_a_line_per_memory(capfd):
    run_pretrain(1, tiny_gpt(**_FLAGS), print_output=True)
    lines = [line for line in capfd.readouterr().out.splitlines() if "ultramem layer" in line]
    assert len(lines) == 4
    assert "ultramem layer   3 | top-1 score: " in lines[-1]
    assert "value learning rate: " in lines[-1]


def test_product_keys_leave_out_what_does_not_apply(tmp_path, capfd):
    flags = {**_FLAGS, "ultramem_retrieval": "pkm", "tensorboard_dir": tmp_path}
    run_pretrain(1, tiny_gpt(**flags), print_output=True)
    assert "lambda" not in capfd.readouterr().out.split("ultramem layer", 1)[1]
    assert not any("lambda" in tag for tag in _scalars(tmp_path))


@pytest.mark.parametrize(
    ("cosine", "used", "reads_per_value", "warns"),
    [
        (0.95, 0.5, 2, True),
        (0.5, 0.005, 2, True),
        (0.5, 0.005, 0.1, False),
        (0.5, 0.05, 2, False),
        (math.nan, 0.5, 2, False),
    ],
)
def test_a_collapse_is_warned_of(cosine, used, reads_per_value, warns):
    metrics = {"query cosine": cosine, "values used": used}
    warning = collapse_warning(3, metrics, reads_per_value)
    assert (warning is not None) is warns
    if warning:
        assert "layer 3" in warning
        assert "--ultramem-query-centering" in warning


def test_statistics_by_hand():
    layer = small_layer(num_keys=3, topk=2, heads=1, cores=1)
    x = torch.randn(4, 24, dtype=torch.float64)
    out = layer(x)
    retrieved = layer.retrieve(layer.query(x))
    forwards, sums, hits = layer.statistics.take()
    assert forwards == 1
    top_one, mean, std, cosine = sums.tolist()
    in_float32 = rounding(torch.float32, out.numel())
    assert top_one == pytest.approx(retrieved.scores[:, 0].mean().item(), rel=in_float32)
    assert mean == pytest.approx(retrieved.scores.mean().item(), rel=in_float32)
    assert std == pytest.approx(out.std().item(), rel=in_float32)
    queries = torch.nn.functional.normalize(layer.query(x), dim=-1)
    pairs = [(queries[i] * queries[j]).sum(-1).mean() for i in range(4) for j in range(i)]
    assert cosine == pytest.approx(sum(pairs).item() / 6, abs=in_float32)
    rows = layer.shuffle(retrieved.addresses) % 9
    assert torch.equal(hits.long(), rows.flatten().bincount(minlength=9))
