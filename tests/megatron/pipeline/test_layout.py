"""Spans and pipeline stages: what is refused, and the layout advised."""

from types import SimpleNamespace

import pytest
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.pipeline.layout import (
    allowed_cuts,
    check_pipeline,
    most_on_one_stage,
    pipeline_chunks,
    spans_cross_stages,
    suggest_layout,
)
from ultramem_megatron.memory.spans import parse_spans

_SPANS = parse_spans("3:5/6:8/9:11", 12)


def _config(stages, virtual=None, layout=None, num_layers=12, **changes):
    layout = layout and PipelineParallelLayerLayout(layout, stages)
    settings = {
        "num_layers": num_layers,
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": virtual,
        "pipeline_model_parallel_layout": layout,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "fp32_residual_connection": False,
    }
    return SimpleNamespace(**{**settings, **changes})


def _layers(config):
    return [(chunk.first, chunk.last) for chunk in pipeline_chunks(config)]


def test_chunks_of_every_kind_of_split():
    assert _layers(_config(1)) == [(1, 12)]
    assert _layers(_config(3)) == [(1, 4), (5, 8), (9, 12)]
    assert _layers(_config(2, virtual=3)) == [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12)]
    uneven = _config(2, num_layers_in_first_pipeline_stage=5)
    assert _layers(uneven) == [(1, 5), (6, 12)]
    assert _layers(_config(2, layout="Et*5|t*7L")) == [(1, 5), (6, 12)]
    assert _layers(_config(2, virtual=2, layout="Et*2|t*6|t*3|tL")) == [
        (1, 2),
        (3, 8),
        (9, 11),
        (12, 12),
    ]
    embedding_alone = _config(2, layout="E|t*12L")
    assert _layers(embedding_alone) == [(1, 0), (1, 12)]


@pytest.mark.parametrize("layout", ["Et*5|t*7L", "Et*8|t*4L", "E|t*12L"])
def test_spans_within_stages_do_not_cross(layout):
    config = _config(2, layout=layout)
    assert not spans_cross_stages(_SPANS, config)
    check_pipeline(_SPANS, config)


@pytest.mark.parametrize("config", [_config(2), _config(2, virtual=2), _config(4)])
def test_crossing_spans_are_carried(config):
    assert spans_cross_stages(_SPANS, config)
    check_pipeline(_SPANS, config)


def test_what_cannot_be_carried_is_refused_with_a_layout_that_works():
    with pytest.raises(UltraMemError) as refused:
        check_pipeline(_SPANS, _config(2, fp32_residual_connection=True))
    message = str(refused.value)
    assert "span 6:8 starts in pipeline stage 0 (layers 1-6) and ends in stage 1" in message
    assert "--fp32-residual-connection" in message
    layout = message.split('"')[1]
    check_pipeline(_SPANS, _config(2, layout=layout, fp32_residual_connection=True))


def test_a_stage_without_layers_cannot_pass_a_result_on():
    with pytest.raises(UltraMemError, match="stage 0 has no transformer layer to pass it on"):
        check_pipeline(_SPANS, _config(3, layout="E|t*7|t*5L"))


def test_more_stages_than_the_spans_allow():
    spans = parse_spans("1:6/7:12", 12)
    for stages, virtual, fitting in ((4, None, 2), (2, 2, 1)):
        config = _config(stages, virtual=virtual, fp32_residual_connection=True)
        advice = f"use --pipeline-model-parallel-size {fitting} or less"
        with pytest.raises(UltraMemError, match=rf"at most 2 stages .* 4 are asked for: {advice}"):
            check_pipeline(spans, config)


@pytest.mark.parametrize("chunks", range(1, 7))
def test_suggested_layouts_are_valid_and_even(chunks):
    layout = suggest_layout(_SPANS, _config(1), chunks)
    config = _config(chunks, layout=layout)
    assert not spans_cross_stages(_SPANS, config)
    sizes = [last - first + 1 for first, last in _layers(config)]
    assert sum(sizes) == 12
    assert min(sizes) >= 1
    assert max(sizes) == {1: 12, 2: 7, 3: 5, 4: 4, 5: 3, 6: 3}[chunks]


def test_allowed_cuts():
    assert allowed_cuts(_SPANS, 12) == [1, 2, 5, 8, 11]
    assert suggest_layout(_SPANS, _config(1), 7) is None


def test_an_advised_layout_has_the_heads_for_later_tokens():
    assert suggest_layout(_SPANS, _config(1, mtp_num_layers=2), 2) == "Et*5|t*7mmL"


def test_fullest_stage():
    assert most_on_one_stage([span.start for span in _SPANS], _config(2, layout="Et*5|t*7L")) == 2
    assert most_on_one_stage([span.start for span in _SPANS], _config(1)) == 3
