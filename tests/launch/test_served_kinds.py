"""vLLM with the folders of every kind of values, and of tables in 8 bits: transformers' tokens."""

from pathlib import Path
from typing import Any

import pytest

from tests.launch.served import NEEDS_VLLM, TOLERANCE, ULTRAMEM, export, generated, greedy
from tests.ranks import run_on_ranks
from tests.tools.export.models import FAMILY
from ultramem_megatron.tools.quantize import quantize

pytestmark = NEEDS_VLLM
_KINDS: dict[str, dict[str, Any]] = {
    "ultramem": ULTRAMEM,
    "pkm": {**ULTRAMEM, "ultramem_retrieval": "pkm", "ultramem_softmax": True},
    "ultramemv2": FAMILY["ultramemv2"],
    "memory+": FAMILY["memory+"],
    "peer": {**FAMILY["peer"], "ultramem_value_dim": 128},
}
_CASES = [*_KINDS, "ultramem int8", "ultramemv2 fp8"]


@pytest.mark.parametrize("case", _CASES)
def test_tokens_and_their_probabilities_are_those_of_transformers(
    case: str, tmp_path: Path
) -> None:
    kind, _, bits = case.partition(" ")
    run_on_ranks(1, export, tmp_path, _KINDS[kind])
    model = "hf"
    if bits:
        model = bits
        quantize(tmp_path / "hf", tmp_path / bits, bits, None)
    wanted = greedy(tmp_path, model)
    for (ids, logs), (wanted_ids, wanted_logs) in zip(
        generated(tmp_path, model)[0], wanted, strict=True
    ):
        assert ids == wanted_ids
        assert logs == pytest.approx(wanted_logs, abs=TOLERANCE)
