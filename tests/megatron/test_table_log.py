"""--ultramem-log-tables-interval: pictures of reads, and steps of the tables, on any layout."""

import io

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.closeness import rounding
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.usage_pictures import picture

_STEPS = ("table-gradient-norm", "table-update-ratio")
_FLAGS = {
    "num_layers": 4,
    "ultramem_spans": "1:2/3:4",
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
    "train_iters": 4,
    "log_interval": 2,
    "ultramem_log_tables_interval": 4,
    "clip_grad": 0,
}
_LAYOUTS = {
    "tables over two ranks": (2, {}),
    "distributed optimizer, whole tables": (
        2,
        {"use_distributed_optimizer": True, "ultramem_parallel_size": 1},
    ),
    "two stages": (2, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True}),
}


def _events(folder):
    everything = {"scalars": 0, "images": 0, "histograms": 0}
    events = EventAccumulator(str(folder), size_guidance=everything)
    events.Reload()
    return events


def _train(folder, world_size=1, **changes):
    flags = tiny_gpt(**{**_FLAGS, **changes}, tensorboard_dir=folder)
    run = run_pretrain(world_size, flags, gradients_at=4, parameters=True)
    return _events(folder), run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("events"))


def test_reads_add_up_and_come_only_when_they_are_due(alone):
    events, _ = alone
    for layer in (1, 3):
        [histogram] = events.Histograms(f"ultramem/reads-per-value/layer-{layer:03d}")
        found = histogram.histogram_value
        assert histogram.step == 4
        # Two steps of 8 sequences of 32 tokens, each with 2 heads of 6 values.
        assert found.sum == 2 * 8 * 32 * 2 * 6
        assert found.num == sum(found.bucket) == 12 * 12
        used = events.Scalars(f"ultramem/values-used/layer-{layer:03d}")[-1].value
        assert 1 - found.bucket[0] / found.num == pytest.approx(used)
        [image] = events.Images(f"ultramem/key-grid/layer-{layer:03d}")
        assert (image.step, image.width, image.height) == (4, 264, 264)  # 24 keys, 11 pixels each


def test_steps_are_those_of_gradients_and_weights(alone, tmp_path):
    events, run = alone
    before = _train(tmp_path, exit_interval=3)[1]
    for layer in (1, 3):
        tables = [name for name in run.ranks[0].parameters if f"layers.{layer - 1}." in name]
        [name] = [name for name in tables if name.endswith("values.weight")]
        gradient = run.ranks[0].gradients[name]
        old, new = (r.ranks[0].parameters[name].double() for r in (before, run))
        expected = (gradient.norm(), (new - old).norm() / old.norm())
        for tag, value in zip(_STEPS, expected, strict=True):
            [logged] = events.Scalars(f"ultramem/{tag}/layer-{layer:03d}")
            assert logged.step == 4
            assert logged.value == pytest.approx(float(value), rel=rounding(torch.float32, 100))


def test_filter_recall_is_logged(alone):
    events, _ = alone
    for layer in (1, 3):
        [recall] = events.Scalars(f"ultramem/filter-recall/layer-{layer:03d}")
        assert recall.step == 4
        assert 0.5 < recall.value <= 1


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_layouts_log_the_same(layout, alone, tmp_path):
    world_size, changes = _LAYOUTS[layout]
    events, _ = _train(tmp_path, world_size, **changes)
    stages = "pipeline_model_parallel_size" in changes
    for layer in (1, 3):
        for tag in _STEPS:
            [here], [there] = (
                e.Scalars(f"ultramem/{tag}/layer-{layer:03d}") for e in (events, alone[0])
            )
            # On two stages Megatron draws other weights.
            assert here.value == pytest.approx(there.value, rel=0.2 if stages else 1e-3)
        tag = f"ultramem/reads-per-value/layer-{layer:03d}"
        [here], [there] = (e.Histograms(tag) for e in (events, alone[0]))
        assert here.histogram_value.sum == there.histogram_value.sum
        if stages:
            continue
        # Reads differ where two scores are equal but for rounding.
        assert here.histogram_value.bucket == pytest.approx(there.histogram_value.bucket, abs=2)
        grids = [_pixels(e, layer) for e in (events, alone[0])]
        assert np.mean(np.abs(grids[0] - grids[1]) > 16) < 0.01


def _pixels(events, layer):
    from PIL import Image

    [image] = events.Images(f"ultramem/key-grid/layer-{layer:03d}")
    return np.asarray(Image.open(io.BytesIO(image.encoded_image_string)), dtype=np.int64)


@pytest.mark.long
def test_weights_and_biases_has_the_pictures_too(tmp_path):
    flags = {"wandb_project": "tables", "wandb_exp_name": "run", "wandb_save_dir": tmp_path}
    run_pretrain(1, tiny_gpt(**_FLAGS, **flags), env={"WANDB_MODE": "offline"})
    pictures = [
        path.name for path in tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png")
    ]
    assert sorted(name[:9] for name in pictures) == ["layer-001", "layer-003"]


def test_a_picture_shows_rows_down_and_reads_as_brightness():
    shown = picture(torch.tensor([[0, 9], [99, 0]]))
    assert shown.shape == (256, 256)
    assert shown[0, 0] == shown[-1, -1] == 0
    assert (shown[0, -1], shown[-1, 0]) == (128, 255)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ultramem_log_tables_interval": 3}, "multiple of --log-interval 2"),
        ({"ultramem_log_tables_interval": 0}, "multiple of --log-interval 2"),
        ({}, "nowhere to log to"),
    ],
)
def test_refused(changes, said):
    with pytest.raises(AssertionError, match=said) as raised:
        run_pretrain(1, tiny_gpt(**{**_FLAGS, **changes}))
    assert UltraMemError.__name__ in str(raised.value)
