"""vLLM with tables over two ranks, or left on disk: transformers' tokens, and half the bytes."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.served import NEEDS_VLLM, TOLERANCE, ULTRAMEM, export, generated, greedy
from tests.ranks import run_on_ranks
from tests.tools.export.models import FAMILY
from ultramem_megatron.tools.quantize import quantize

pytestmark = [
    *NEEDS_VLLM,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ranks are bound to cores"),
]
_KINDS: dict[str, dict[str, Any]] = {"ultramem": ULTRAMEM, "ultramemv2": FAMILY["ultramemv2"]}


def _as_transformers(folder: Path, model: str, ranks: int, **overrides: Any) -> list[int]:
    """Compare the tokens; returns each rank's bytes of tables."""
    found, held = generated(folder, model, ranks, **overrides)
    for (ids, logs), (wanted_ids, wanted_logs) in zip(found, greedy(folder, model), strict=True):
        assert ids == wanted_ids
        assert logs == pytest.approx(wanted_logs, abs=TOLERANCE)
    return held


@pytest.mark.parametrize("case", ["ultramem", "ultramem int8", "ultramemv2"])
def test_two_ranks_hold_half_of_the_tables_each(case: str, tmp_path: Path) -> None:
    kind, _, bits = case.partition(" ")
    run_on_ranks(1, export, tmp_path, _KINDS[kind])
    model = bits or "hf"
    if bits:
        quantize(tmp_path / "hf", tmp_path / bits, bits, None)
    (whole,) = _as_transformers(tmp_path, model, 1)
    assert _as_transformers(tmp_path, model, 2) == [whole // 2, whole // 2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_tables_are_left_on_disk(ranks: int, tmp_path: Path) -> None:
    run_on_ranks(1, export, tmp_path, ULTRAMEM)
    assert all(_as_transformers(tmp_path, "hf", ranks, table_memory="disk"))
