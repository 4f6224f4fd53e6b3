"""Designs that could be built, but neither learn nor stay finite, are refused by name."""

import re

import pytest

from tests.layers import small_config
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.spans import Span
from ultramem_megatron.memory.validation import validate


def _validate(**changes):
    validate(small_config(**changes), hidden_size=16, num_layers=12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_dim": 1, "tucker_rank": 1}, "--ultramem-key-dim is 1; under --ultramem-qk-norm lay"),
        ({"softmax": True, "topk": 1}, "--ultramem-topk is 1; under --ultramem-softmax it must be"),
        ({"aux_loss_weight": 1e308}, "--ultramem-aux-loss-weight is 1e+308; it must be a number"),
        ({"aux_loss_weight": float("nan")}, "--ultramem-aux-loss-weight is nan"),
        ({"aux_loss_weight": -1.0}, "from 0 to 10000"),
        ({"aux_loss_margin": 1e30}, "--ultramem-aux-loss-margin is 1e+30"),
        ({"value_lr_mult": 1e308}, "--ultramem-value-lr-mult is 1e+308"),
        ({"value_lr_mult": 0.0}, "(1: the base rate), from 0.0001 to 10000"),
        ({"value_lr_decay": 1e-300}, "--ultramem-value-lr-decay is 1e-300; it must be a fraction"),
        ({"value_expansion": -1}, "Use 1 or 4"),
        ({"value_expansion": 5}, "Use 4 or 9"),
        ({"query_conv_kernel": 10**13}, "--ultramem-query-conv-kernel is 10000000000000; it must"),
        ({"key_dim": 2**31, "tucker_rank": 1}, "a whole number <= 2147483647"),
        ({"num_keys": "24"}, "--ultramem-num-keys is '24'; it must be a whole number"),
        ({"share_query": 1}, "--ultramem-share-query is 1; it must be true or false"),
        ({"share_order": []}, "--ultramem-share-order is []; it must be one of block, ring"),
        ({"share_values": float("inf")}, "--ultramem-share-values is inf; it must be a number"),
        (
            {"replace_mlp": True, "spans": (Span(2, 2), Span(3, 5))},
            "--ultramem-spans 3:5 with --ul",
        ),
    ],
)
def test_a_dead_or_endless_design_is_refused(changes, message):
    with pytest.raises(UltraMemError, match=re.escape(message)):
        _validate(**changes)


def test_their_neighbours_are_allowed():
    _validate(key_dim=1, tucker_rank=1, qk_norm="none")
    _validate(topk=1)
    _validate(softmax=True, topk=2)
