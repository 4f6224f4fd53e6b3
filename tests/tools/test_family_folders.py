"""Quantize, inspect, edit and tables on disk, for folders of UltraMemV2, Memory+ and PEER."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.closeness import assert_close
from tests.decoding import LOGITS
from tests.tools.export.test_hf_training import small_model
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.layer import memory_layers
from ultramem_megatron.tools.edit.__main__ import main as edit
from ultramem_megatron.tools.edit.contributions import contributions
from ultramem_megatron.tools.edit.edits import Edit
from ultramem_megatron.tools.edit.fact import read_fact
from ultramem_megatron.tools.edit.write import write_edited
from ultramem_megatron.tools.export.hf.modeling_ultramem import UltraMemGPTForCausalLM
from ultramem_megatron.tools.export.hf_folder import save_hf
from ultramem_megatron.tools.export.hf_tokenizer import HFTokenizer
from ultramem_megatron.tools.export.opened_folder import open_folder
from ultramem_megatron.tools.inspect.hf_reads import record_hf_reads
from ultramem_megatron.tools.quantize import quantize

_MEMBERS = ("ultramemv2", "memory+", "peer")
_TEXT = "3 1 4 1 5 9 2 6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One of each member."""
    folder = tmp_path_factory.mktemp("family")
    for name in _MEMBERS:
        save_hf(small_model(name).eval(), folder / name, HFTokenizer(), "card")
    return folder


@pytest.mark.parametrize("name", _MEMBERS)
def test_a_share_is_what_the_output_lacks_without_the_value(folder, name):
    opened = open_folder(folder / name)
    fact = read_fact(opened, "3 1 4", " 1")
    fired = contributions(opened, fact)
    first = fired[0].layer if name == "peer" else 1
    of_first = [one for one in fired if one.layer == first]
    assert sum(one.share for one in of_first) == pytest.approx(1, abs=1e-5)
    model = opened.model.model
    table = (model.tables[0] if model.tables else model.layers[first - 1].memory).values.weight
    with torch.no_grad():
        whole = _added(opened, fact, first)
        for one in of_first[:2]:
            kept = table[one.value].clone()
            table[one.value] = 0
            missing = whole - _added(opened, fact, first)
            table[one.value] = kept
            assert one.share == pytest.approx(float(missing @ whole / (whole @ whole)), abs=1e-5)


def _added(opened, fact, layer):
    """(D,): what values add where the fact is said."""
    found = []
    memory = opened.model.model.layers[layer - 1].memory
    hook = memory.register_forward_hook(lambda _, __, out: found.append(out[0, fact.start - 1]))
    opened.model(torch.tensor([fact.ids]))
    hook.remove()
    bias = None if memory.value_proj is None else memory.value_proj.bias
    return found[0] if bias is None else found[0] - bias


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_a_row_changes_in_the_table_that_layers_share(folder, tmp_path, kind):
    source = folder / "ultramemv2"
    if kind == "int8":
        source = tmp_path / "int8"
        quantize(folder / "ultramemv2", source, "int8", None)
    write_edited(source, tmp_path / "out", [Edit(2, 7, factor=0.0), Edit(3, 8, source=9)])
    before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "out"))
    for name, tensor in before.items():
        wanted = tensor.clone()
        if name.startswith("model.tables.0."):
            wanted[8] = tensor[9]
            if name.endswith((".values.weight", ".values.scales")):
                wanted[7] = 0
        assert torch.equal(after[name], wanted), name
    card = (tmp_path / "out/README.md").read_text()
    assert "- Layers 1, 2, 3 share their table: all of them read what is changed.\n" in card


def test_a_shared_row_is_named_once(folder, tmp_path, capsys):
    said = ["--prompt", "3 1 4", "--fact", " 1"]
    with pytest.raises(UltraMemError, match=r"1:7 is named 2 times.*Layers 1, 2, 3 share"):
        edit([str(folder / "ultramemv2"), str(tmp_path / "out"), *said, "--zero", "1:7", "3:7"])
    edit([str(folder / "memory+"), str(tmp_path / "out"), *said, "--zero-most", "15"])
    assert "Layers 1, 2, 3 share their table: all of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "block"), [("ultramemv2", 4), *((name, None) for name in _MEMBERS)]
)
def test_in_8_bits_the_model_is_that_of_the_decoded_tables(folder, tmp_path, name, block):
    quantize(folder / name, tmp_path / "out", "int8", block)
    model = UltraMemGPTForCausalLM.from_pretrained(tmp_path / "out")
    exact = UltraMemGPTForCausalLM.from_pretrained(folder / name)
    tables = {n: m for n, m in model.named_modules() if n.endswith("values")}
    assert len(tables) == (1 if name == "memory+" else 2)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        for path, table in tables.items():
            decoded = table.read(torch.arange(len(table.codes)))
            weight = exact.get_submodule(path).weight
            assert 0 < (weight - decoded).norm() < 0.01 * weight.norm()
            weight.copy_(decoded)
        assert_close(model(tokens).logits, exact(tokens).logits, LOGITS)
    low = UltraMemGPTForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    scales = [t for n, t in low.state_dict().items() if n.endswith("scales")]
    assert {t.dtype for t in scales} == {torch.float32}


def test_a_block_divides_pre_values_too(folder, tmp_path):
    with pytest.raises(UltraMemError, match=r"--block is 16; pre-values are 8 wide"):
        quantize(folder / "ultramemv2", tmp_path / "out", "int8", 16)


@pytest.mark.parametrize("name", _MEMBERS)
def test_the_values_listed_are_those_that_our_layers_read(folder, name):
    _, found = record_hf_reads(open_folder(folder / name), _TEXT, 100)
    plain, ours = small_model(name).eval(), []
    for layer in memory_layers(plain):
        layer.retrieval.register_forward_hook(
            lambda _, __, out, layer=layer: ours.append(layer.locate(out.addresses))
        )
    with torch.no_grad():
        plain(torch.tensor([[int(word) for word in _TEXT.split()]]))
    for reads, layer, addresses in zip(found, memory_layers(plain), ours, strict=True):
        assert reads.layer_number == layer.layer_number
        listed = reads.groups * layer.config.num_values + reads.values
        assert torch.equal(listed.sort().values, addresses.sort().values)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise is Linux's")
def test_pre_values_and_shared_tables_are_left_on_disk(folder):
    model = UltraMemGPTForCausalLM.from_pretrained(folder / "ultramemv2", table_memory="disk")
    assert set(model.table_pages()) == {
        "model.tables.0.values.weight",
        "model.tables.0.pre_values.weight",
    }
