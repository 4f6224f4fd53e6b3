"""What a pattern means, what of it is refused, and the layout advised."""

from argparse import Namespace
from types import SimpleNamespace

import pytest

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.checkpoint.design import differing_flags
from ultramem_megatron.megatron.flags.arguments import config_from_args
from ultramem_megatron.megatron.flags.layout_flags import lay_on_one_rank
from ultramem_megatron.megatron.hybrid.refusals import refuse_pattern
from ultramem_megatron.megatron.pipeline.layout import (
    layout_flag,
    pipeline_chunks,
    spans_cross_stages,
    suggest_layout,
)
from ultramem_megatron.megatron.pipeline.pattern import keep_pattern, readable_layers, stages
from ultramem_megatron.memory.spans import parse_spans


def _flags(pattern, spans="2:3", **changes):
    flags = {
        "hybrid_layer_pattern": pattern,
        "num_layers": len("".join(stages(pattern))),
        "hidden_size": 32,
        "num_experts": None,
        "seed": 1,
        "transformer_impl": "transformer_engine",
        "pipeline_model_parallel_size": 1,
        "ultramem_spans": spans,
        "ultramem_num_keys": 8,
        "ultramem_topk": 4,
        "ultramem_overlap": False,
        "mla_down_proj_fusion": False,
        "tensor_model_parallel_size": 1,
        "mamba_state_dim": 16,
        "mamba_head_dim": 8,
        "mamba_num_groups": 8,
        "mamba_num_heads": None,
    }
    return Namespace(**{**flags, **changes})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (_flags("*-*-", "1:2"), r"layer 1 of .* is '\*' \(attention\), but .* start it at .* 2, 4"),
        (_flags("M-M-", "3:4"), r"layer 3 of .* is 'M' \(Mamba\)"),
        (_flags("M*M*", "2:2"), "there is none, so it can have no memories"),
        (_flags("+-+-", mla_down_proj_fusion=True), "--mla-down-proj-fusion cannot be combined"),
        (_flags("*E*E"), "Add --num-experts"),
        (_flags("*-*-*-", pipeline_model_parallel_size=2), r"for example \*-\*\|-\*-"),
        (_flags("*-*-/*-", pipeline_model_parallel_size=2), r"for example \*-\|\*-/\*-\."),
        (_flags("*-G-", transformer_impl="local"), r"a gated delta net \('G'\) needs"),
        (_flags("+-+-", transformer_impl="local"), r"latent attention \('\+'\) needs"),
        (
            _flags("M-M-", "2:3", mamba_head_dim=64),
            r"32 make 1 heads .* by --mamba-num-groups 8\. .* 1",
        ),
        (_flags("M-M-", "2:3", mamba_head_dim=48), r"something is left\. Give a divisor of 64"),
        (_flags("M-M-", "2:3", mamba_num_heads=12), r"-heads 12: not .* example to .*-groups 4"),
        (_flags("M-M-", "2:3", mamba_num_groups=0), r"-groups 0: it must be at least 1"),
        (
            _flags("M-M-", "2:3", mamba_num_groups=2, tensor_model_parallel_size=4),
            r"-groups 2: not divisible by --tensor-model-parallel-size 4",
        ),
    ],
)
def test_what_a_pattern_cannot_have_is_refused(flags, message):
    with pytest.raises(UltraMemError, match=message):
        refuse_pattern(flags, config_from_args(flags))


@pytest.mark.parametrize("spans", ["2:2", "2:3", "4:5/6:6"])
def test_spans_may_end_anywhere(spans):
    flags = _flags("*-M-ME", spans, num_experts=4, transformer_impl="local")
    refuse_pattern(flags, config_from_args(flags))


def test_full_is_every_mlp_and_all_experts():
    spans = config_from_args(_flags("*-M|-*E", "full")).spans
    assert [str(span) for span in spans] == ["2:2", "4:4", "6:6"]
    assert readable_layers("*-M|-*E/-") == (2, 4, 6)


def test_where_stages_end_makes_no_other_model():
    one, cut, other = (_flags(pattern) for pattern in ("*-M-", "*-|M-", "*-*-"))
    for flags in (one, cut, other):
        flags.moe_use_upcycling = flags.finetune = False
    assert differing_flags(one, cut) == []
    assert differing_flags(one, other) == [
        "hybrid_layer_pattern is *-M- here, *-*- in the checkpoint"
    ]
    lay_on_one_rank(cut)
    assert cut.hybrid_layer_pattern == "*-M-"


def _config(pattern, stage_count, virtual=None):
    config = SimpleNamespace(
        num_layers=len("".join(stages(pattern))),
        pipeline_model_parallel_size=stage_count,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_model_parallel_layout=None,
    )
    keep_pattern(config, pattern)
    return config


def test_chunks_are_what_stands_between_bars():
    chunks = pipeline_chunks(_config("*-|M-*|-|M", 2, virtual=2))
    assert [(c.pp_rank, c.vp_stage, c.first, c.last) for c in chunks] == [
        (0, 0, 1, 2),
        (1, 0, 3, 5),
        (0, 1, 6, 6),
        (1, 1, 7, 7),
    ]


def test_a_layout_is_advised_as_a_pattern():
    spans = parse_spans("2:3/4:6", 6)
    config = _config("*-M|-*-", 2)
    assert not spans_cross_stages(spans, config)
    crossed = _config("*-|M-*-", 2)
    assert spans_cross_stages(spans, crossed)
    assert layout_flag(crossed) == "--hybrid-layer-pattern"
    assert suggest_layout(spans, crossed, 2) == "*-M|-*-"
    assert suggest_layout(spans, crossed, 4) is None
    assert suggest_layout(spans, _config("*-|M-*-/*-", 2), 2) == "*-M|-*-/*-"
