"""On a CPU a folder's tables are read from their file where a token needs them, not all at once."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.tools.export.test_hf_folder import _plain
from ultramem_megatron.tools.export.hf.modeling_ultramem import UltraMemGPTForCausalLM
from ultramem_megatron.tools.export.hf_folder import save_hf
from ultramem_megatron.tools.export.hf_tokenizer import HFTokenizer


def _resident(file: Path) -> int:
    """Bytes of this process' memory that are pages of the file."""
    found = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def _forget(file: Path) -> None:
    """Out of the system's cache, which maps whole pieces of what was just written."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
def test_only_what_is_read_of_a_table_comes_into_memory(tmp_path):
    plain = _plain(num_keys=1024, value_dim=16)  # 64 MB
    save_hf(plain, tmp_path / "hf", HFTokenizer(), "card")
    file = tmp_path / "hf/model.safetensors"
    _forget(file)
    model = UltraMemGPTForCausalLM.from_pretrained(tmp_path / "hf")
    table = model.model.layers[0].memory.values.weight
    assert table.nbytes == 2**26
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(model(ids).logits, model(ids).logits)
        assert 0 < _resident(file) < table.nbytes // 2
        table.sum()  # all of it
        assert _resident(file) >= table.nbytes
