"""Memories of the family are not exported as if they were of the first version."""

from typing import Any

import pytest

from tests.layers import small_config
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.spans import Span
from ultramem_megatron.tools.export.megatron import _refuse_memories


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"values": "prevalued"}, "--ultramem-values prevalued"),
        ({"projection_bias": True}, "--ultramem-projection-bias True"),
        ({"value_expansion": 1, "key_expansion": 2}, "--ultramem-key-expansion 2"),
        ({"spans": (Span(1, 1), Span(2, 2)), "share_values": 2}, "--ultramem-share-values 2"),
    ],
)
def test_they_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UltraMemError, match=f"A model with {named} cannot be exported yet"):
        _refuse_memories(small_config(**changes))


@pytest.mark.parametrize("expansion", [1, 4, 9])
def test_the_first_version_is_not(expansion: int) -> None:
    _refuse_memories(small_config(value_expansion=expansion, rank_layout="full"))
