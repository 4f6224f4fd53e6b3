"""UltraMemV2, Memory+ and PEER leave Megatron as models of the first version do, and come back."""

import pytest
from safetensors.torch import load_file

from tests.decoding import LOGITS
from tests.ranks import run_on_ranks
from tests.tools.export.models import (
    FAMILY,
    TOLERANCES,
    assert_megatrons_logits,
    assert_one_continuation,
    in_transformers,
    round_trip,
)

pytestmark = pytest.mark.long  # UltraMemV2 is among the models of test_huggingface.py too

_FLOAT32 = [name for name in FAMILY if "bf16" not in name]
_TABLES = {
    "ultramemv2": (2, 2),
    "ring": (1, 4),
    "noring": (1, 4),
    "memory+": (1, 1),
    "peer": (2, 1),
    "experts apart": (2, 2),
}
"""Tables of a kind, and their rows over those of 12 keys a side."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    return folder, run_on_ranks(1, round_trip, folder, FAMILY, "hf")[0]


@pytest.fixture(scope="module")
def opened(exported, tmp_path_factory):
    return in_transformers(exported[0], tmp_path_factory.mktemp("results"), *FAMILY)


@pytest.mark.parametrize("name", FAMILY)
def test_transformers_gives_megatrons_logits(exported, opened, name):
    assert_megatrons_logits(exported[1][name], opened[name], TOLERANCES.get(name, LOGITS))


@pytest.mark.parametrize("name", _FLOAT32)
def test_continuations_are_the_same_with_a_cache_in_batches_and_beams(opened, name):
    assert_one_continuation(opened[name])


@pytest.mark.parametrize("name", _FLOAT32)
def test_a_table_is_stored_once_whoever_reads_it(exported, name):
    stored = load_file(exported[0] / name / "hf/model.safetensors")
    tables = [tensor for key, tensor in stored.items() if key.endswith("values.weight")]
    number, squares = _TABLES[name]
    assert len(tables) == number * (1 if name == "memory+" else 2)
    assert {len(table) for table in tables} == {squares * 12**2}
