"""On a CPU a folder's tables are read from their file where a token needs them, not all at once."""

import os
import sys
import time

import pytest
import torch

from tests.resident import forget, resident
from tests.tools.export.test_hf_folder import _plain
from ultramem_megatron.tools.export.hf.modeling_ultramem import UltraMemGPTForCausalLM
from ultramem_megatron.tools.export.hf_folder import save_hf
from ultramem_megatron.tools.export.hf_tokenizer import HFTokenizer
from ultramem_megatron.tools.quantize import quantize


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
def test_only_what_is_read_of_a_table_comes_into_memory(tmp_path):
    plain = _plain(num_keys=1024, value_dim=16)  # 64 MB
    save_hf(plain, tmp_path / "hf", HFTokenizer(), "card")
    file = tmp_path / "hf/model.safetensors"
    forget(file)
    model = UltraMemGPTForCausalLM.from_pretrained(tmp_path / "hf")
    table = model.model.layers[0].memory.values.weight
    assert table.nbytes == 2**26
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(model(ids).logits, model(ids).logits)
        assert 0 < resident(file) < table.nbytes // 2
        table.sum()  # all of it
        assert resident(file) >= table.nbytes


def _settled(model):
    """Pages in memory when what the system reads ahead of the other weights has come."""
    found = model.table_pages()
    for _ in range(40):
        time.sleep(0.3)
        before, found = found, model.table_pages()
        if found == before:
            break
    return found


def _rows(model):
    """Collects the rows that are read of the only table."""
    memory = model.model.layers[0].memory
    side, found = memory.side, []

    def keep(_, args):
        found.append(args[0] % (side * side // memory.values.expansion))

    memory.values.register_forward_pre_hook(keep)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise and mincore are Linux's")
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_left_on_disk_no_page_but_those_of_its_rows_comes(tmp_path, kind):
    save_hf(_plain(num_keys=1024, value_dim=16), tmp_path / "hf", HFTokenizer(), "card")
    if kind == "int8":
        quantize(tmp_path / "hf", tmp_path / "int8", "int8", None)
    folder = tmp_path / ("hf" if kind == "float" else "int8")
    forget(folder / "model.safetensors")
    model = UltraMemGPTForCausalLM.from_pretrained(folder, table_memory="disk")
    found = _rows(model)
    before = _settled(model)
    held, of = map(sum, zip(*before.values(), strict=True))
    assert held < of / 2, "more was in memory than is read ahead of other weights"
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    rows = torch.cat(found).flatten().unique()
    for name, tensor in model.table_tensors().items():
        page = os.sysconf("SC_PAGESIZE")
        of_row = (tensor.data_ptr() % page + rows * tensor[0].nbytes) // page
        now = model.table_pages()[name][0]
        assert 0 < now <= before[name][0] + len(of_row.unique()), name


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise and mincore are Linux's")
def test_rows_come_while_the_layers_of_a_span_compute(tmp_path):
    save_hf(_plain(num_keys=1024, value_dim=16), tmp_path / "hf", HFTokenizer(), "card")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = UltraMemGPTForCausalLM.from_pretrained(tmp_path / "hf")(ids).logits
    forget(tmp_path / "hf/model.safetensors")
    model = UltraMemGPTForCausalLM.from_pretrained(tmp_path / "hf", table_memory="disk")
    (name,) = model.table_tensors()
    at_start, seen = _settled(model)[name][0], []

    def wait(memory, _, later):
        assert callable(later), "nothing was read yet"
        end = time.monotonic() + 20
        while model.table_pages()[name][0] == at_start and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.2)
        seen.append(model.table_pages()[name][0])

    model.model.layers[0].memory.register_forward_hook(wait)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert seen == [model.table_pages()[name][0]] > [at_start]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise is Linux's")
@pytest.mark.parametrize("kind", ["pooled", "prevalued", "pooled int8", "prevalued fp8"])
def test_results_do_not_depend_on_a_cache_of_rows(tmp_path, kind):
    values, _, bits = kind.partition(" ")
    pre = {"values": values, "pre_value_dim": 6} if values == "prevalued" else {}
    save_hf(_plain(num_keys=32, value_dim=16, **pre), tmp_path / "hf", HFTokenizer(), "card")
    if bits:
        quantize(tmp_path / "hf", tmp_path / bits, bits, None)
    opened = UltraMemGPTForCausalLM.from_pretrained
    whole = opened(tmp_path / (bits or "hf"))
    cached = opened(tmp_path / (bits or "hf"), table_memory="disk", table_cache_rows=64)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(cached(ids).logits, whole(ids).logits)
    caches = cached.table_caches()
    assert len(caches) == (2 if pre else 1)
    for hot in caches.values():
        assert 0 < hot.hits < hot.reads
    assert not whole.table_caches()
    if not bits:
        cached.train()(ids, labels=ids).loss.backward()  # reads the whole table
        assert cached.model.layers[0].memory.values.weight.grad is not None


def test_what_cannot_be_left_on_disk_is_refused(tmp_path):
    save_hf(_plain(), tmp_path / "hf", HFTokenizer(), "card")
    with pytest.raises(
        ValueError, match=r"'disk', but model\.layers\.0\.memory\.values\.weight is"
    ):
        UltraMemGPTForCausalLM.from_pretrained(
            tmp_path / "hf", table_memory="disk", dtype=torch.bfloat16
        )
    with pytest.raises(ValueError, match="table_memory is 'gpu'; this model knows host, disk"):
        UltraMemGPTForCausalLM.from_pretrained(tmp_path / "hf", table_memory="gpu")
    with pytest.raises(ValueError, match="table_cache_rows is 8; it is a number of rows, of table"):
        UltraMemGPTForCausalLM.from_pretrained(tmp_path / "hf", table_cache_rows=8)
