"""Large pages: they are there, and nothing that lies in them changes."""

import platform
import re
from pathlib import Path

import pytest
import torch

from tests.layers import HIDDEN, small_config
from ultramem_megatron.kernels.native import large_pages
from ultramem_megatron.kernels.native.large_pages import LEAST, ask_for_large_pages
from ultramem_megatron.megatron import table_pages
from ultramem_megatron.memory.layer import UltraMemLayer

_LINUX = tuple(int(word) for word in re.findall(r"\d+", platform.release())[:2])
_moves_pages = pytest.mark.skipif(_LINUX < (6, 1), reason="MADV_COLLAPSE is of Linux 6.1")
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _large_bytes(tensor):
    """Of the memory that a tensor lies in, what is in large pages."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):
            start, end = (int(word, 16) for word in name.split("-"))
            inside = start < tensor.data_ptr() + tensor.nbytes and end > tensor.data_ptr()
        elif inside and name == "AnonHugePages:":
            found += 1024 * int(words[0])
    return found


@pytest.mark.skipif(
    not _ENABLED.exists() or "[never]" in _ENABLED.read_text(),
    reason="large pages are switched off here",
)
@pytest.mark.parametrize("filled", [pytest.param(True, marks=_moves_pages), False])
def test_a_tensor_comes_to_lie_in_large_pages_and_keeps_its_numbers(filled):
    tensor = torch.empty(LEAST // 4 + 123)
    if filled:
        tensor.copy_(torch.arange(len(tensor)))
        before = _large_bytes(tensor)
    ask_for_large_pages(tensor, filled=filled)
    if not filled:
        before = 0
        tensor.copy_(torch.arange(len(tensor)))
    assert _large_bytes(tensor) > before
    assert torch.equal(tensor, torch.arange(len(tensor)).float())


def test_others_are_not_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(large_pages, "_madvise", lambda: lambda *given: asked.append(given))
    strided = torch.ones(2, LEAST // 4)[:, ::2]
    for tensor in (torch.ones(3), strided, torch.empty(LEAST, device="meta")):
        ask_for_large_pages(tensor, filled=True)
    assert not asked


def test_tables_and_their_gradients_are_moved_when_the_optimizer_is_there(monkeypatch):
    asked = []
    monkeypatch.setattr(
        table_pages, "ask_for_large_pages", lambda tensor, filled: asked.append((tensor, filled))
    )
    layer = UltraMemLayer(small_config(), hidden_size=HIDDEN, num_layers=2)
    table = layer.values.weight
    table.main_grad = torch.zeros_like(table)
    table_pages.ask_for_table_pages(None, [layer])
    assert [(tensor.data_ptr(), filled) for tensor, filled in asked] == [
        (table.data_ptr(), True),
        (table.main_grad.data_ptr(), True),
    ]
