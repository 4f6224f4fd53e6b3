"""Large pages: they are there, and nothing that lies in them changes."""

from pathlib import Path

import pytest
import torch

from ultramem_megatron.kernels.native.large_pages import LEAST, ask_for_large_pages

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
    not _ENABLED.exists() or "[never]" in _ENABLED.read_text(), reason="this system has none"
)
@pytest.mark.parametrize("filled", [True, False])
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


def test_what_has_none_is_left_alone():
    for tensor in (
        torch.ones(3),
        torch.ones(2, LEAST // 4)[:, ::2],
        torch.empty(LEAST, device="meta"),
    ):
        ask_for_large_pages(tensor, filled=True)
