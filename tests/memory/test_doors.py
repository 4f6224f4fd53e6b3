"""A new variant is a file and a place in a list: each list takes one that nobody else knows."""

import dataclasses
from collections.abc import MutableMapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_close, rounding
from tests.layers import HIDDEN, small_config
from ultramem_megatron.communication.pausing import Pausing, run
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization import INITIALISATIONS
from ultramem_megatron.memory.initialization.scales import Host, Initialisation
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.reference import reference_layer
from ultramem_megatron.memory.retrieval import RETRIEVALS
from ultramem_megatron.memory.retrieval.product_key import ProductKeyRetrieval
from ultramem_megatron.memory.retrieval.retrieved import Retrieved
from ultramem_megatron.memory.tables.contract import PreValues
from ultramem_megatron.memory.tables.partitions import PARTITIONS, choose, shared_partitions
from ultramem_megatron.memory.tables.traffic import Exchange
from ultramem_megatron.memory.tables.value_table import ValueTable
from ultramem_megatron.memory.validation import CHOICES
from ultramem_megatron.memory.values import VALUES
from ultramem_megatron.memory.values.pooled import PooledValues

EPS = 1e-5


class _Doubled(ProductKeyRetrieval):
    def forward(self, query: Tensor) -> Retrieved:
        retrieved = super().forward(query)
        return retrieved._replace(scores=2 * retrieved.scores)


@pytest.mark.parametrize("door", [RETRIEVALS, VALUES, INITIALISATIONS, PARTITIONS])
def test_a_list_says_what_each_of_its_kinds_says_of_itself(door: Any) -> None:
    assert [kind.name for kind in door.values()] == list(door)


def _doubled_reference(*args: Any) -> Any:
    rows, columns, grids = RETRIEVALS["pkm"].reference(*args)
    return rows, columns, [2 * grid for grid in grids]


class _Gated(PooledValues):
    def forward(self, addresses: Tensor, scores: Tensor, x: Tensor | None = None) -> Pausing:
        assert x is not None
        pooled = yield from super().forward(addresses, scores, x)
        return pooled * x.flatten(0, -2).mean(-1)[:, None, None]


def _gated_reference(*args: Any) -> Tensor:
    pooled = VALUES["pooled"].reference(*args)
    return pooled * args[3].mean(-1)[:, None, None]


def _add(
    monkeypatch: pytest.MonkeyPatch, door: MutableMapping[str, Any], field: str, kind: Any
) -> None:
    monkeypatch.setitem(door, kind.name, kind)
    monkeypatch.setitem(CHOICES, field, (*CHOICES[field], kind.name))


def _layer(**changes: Any) -> UltraMemLayer:
    return UltraMemLayer(
        small_config(**changes), hidden_size=HIDDEN, num_layers=2, eps=EPS
    ).double()


def _assert_as_reference(layer: UltraMemLayer) -> None:
    x = torch.randn(5, 2, HIDDEN, dtype=torch.float64)
    expected = reference_layer(x, layer.state_dict(), layer.config, eps=EPS)
    assert_close(layer(x), expected, rounding(torch.float64, HIDDEN))


def test_a_retrieval(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = dataclasses.replace(
        RETRIEVALS["pkm"], name="doubled", build=_Doubled, reference=_doubled_reference
    )
    _add(monkeypatch, RETRIEVALS, "retrieval", kind)
    _assert_as_reference(_layer(retrieval="doubled", tucker_rank=1, cores=1))


def test_values(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = dataclasses.replace(
        VALUES["pooled"],
        name="halved",
        build=lambda config, site: _Gated(config, *site.cut),
        reference=_gated_reference,
    )
    _add(monkeypatch, VALUES, "values", kind)
    _assert_as_reference(_layer(values="halved"))


def test_an_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    def scales(config: UltraMemConfig, host: Host) -> Any:
        paper = INITIALISATIONS["paper"].scales(config, host)
        return dataclasses.replace(paper, values=0.0)

    _add(monkeypatch, INITIALISATIONS, "init", Initialisation("silent", scales))
    assert not _layer(init="silent")(torch.randn(3, HIDDEN, dtype=torch.float64)).any()


def test_a_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that costs nothing is chosen, offered as a flag's value, and read by its own reader."""

    @dataclasses.dataclass(frozen=True)
    class Reversed:
        whole: Any
        pauses = 0

        prevalued_pauses = 0

        def read(
            self, part: Tensor, addresses: Tensor, scores: Tensor, pre: PreValues | None = None
        ) -> Pausing:
            flipped = pre and pre._replace(part=pre.part.flip(0))
            return (yield from self.whole.read(part.flip(0), addresses, scores, flipped))

    whole = PARTITIONS["replicated"]
    kind = dataclasses.replace(
        whole,
        name="reversed",
        parts=lambda size, node: (1, 1),
        check=lambda layout: None,
        reader=lambda *args: Reversed(whole.reader(*args)),
    )
    monkeypatch.setitem(PARTITIONS, "reversed", kind)
    assert choose(Exchange(size=4, picks=6, value_dim=8)) == "reversed"
    assert "reversed" in shared_partitions()

    class Pair:
        size, rank = staticmethod(lambda: 2), staticmethod(lambda: 0)

    config = small_config()
    there, here = ValueTable(config, "reversed", Pair()), ValueTable(config)
    table = torch.randn(config.num_values, config.value_dim)
    there.weight.data, here.weight.data = table, table.flip(0)
    addresses = torch.randint(config.num_values, (3, config.picks))
    scores = torch.randn(3, config.picks, config.cores)
    assert torch.equal(run(there.read(addresses, scores)), run(here.read(addresses, scores)))
