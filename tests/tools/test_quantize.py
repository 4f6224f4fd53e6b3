"""Value tables in 8 bits: errors within half a step, the model that of the decoded values."""

import json

import pytest
import torch

from tests.closeness import assert_close
from tests.decoding import LOGITS
from tests.tools.export.test_hf_folder import _plain
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.export.hf.modeling_ultramem import UltraMemGPTForCausalLM
from ultramem_megatron.tools.export.hf_folder import load_hf, save_hf
from ultramem_megatron.tools.export.hf_tokenizer import HFTokenizer
from ultramem_megatron.tools.quantize import main, quantize_table

_TOKENS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


def _table(number=300, width=12):
    table = torch.randn(number, width, generator=torch.Generator().manual_seed(1))
    table[7] = 0
    table[8] *= 1e-30
    table[9] *= 1e30
    return table


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_codes_stand_for_what_pytorch_says(kind):
    from ultramem_megatron.tools.export.hf.quantized_ultramem import decoded

    codes = torch.arange(256).byte()
    said = codes.view(kind).float()
    finite = said.isfinite()
    assert finite.sum() >= 254
    assert torch.equal(decoded(codes, kind)[finite], said[finite])


@pytest.mark.parametrize("block", [12, 4])
@pytest.mark.parametrize(("kind", "step"), [("int8", 1 / 254), ("fp8", 1 / 16)])
def test_no_value_is_off_by_more_than_half_a_step(kind, step, block):
    from ultramem_megatron.tools.export.hf.quantized_ultramem import QuantizedTable

    table = _table()
    codes, scales, error = quantize_table(table, kind, block)
    quantized = QuantizedTable(1, 12, 1, {"format": kind, "block": block})
    quantized.codes, quantized.scales = codes, scales
    read = quantized.read(torch.arange(len(table)))
    largest = table.unflatten(1, (-1, block)).abs().amax(2, keepdim=True).expand(-1, -1, block)
    assert ((read - table).abs() <= largest.flatten(1) * step * 1.001).all()
    assert torch.equal(read[7], table[7])
    missed, all_of_it = ((x.double().norm()) for x in (read - table, table))
    assert error == pytest.approx(float(missed / all_of_it), rel=1e-3)


@pytest.mark.parametrize("flags", [[], ["--format", "fp8", "--block", "4"]])
def test_the_folder_is_the_model_of_the_decoded_values(flags, tmp_path, capsys):
    plain = _plain()
    save_hf(plain, tmp_path / "hf", HFTokenizer(), "card", shard="10KB")
    (tmp_path / "hf/notes.txt").write_text("mine")
    main([str(tmp_path / "hf"), str(tmp_path / "out"), *flags])
    assert "error" in capsys.readouterr().out
    model = UltraMemGPTForCausalLM.from_pretrained(tmp_path / "out")
    table = model.model.layers[0].memory.values
    rows = torch.arange(len(table.codes))
    [weight] = [p for n, p in plain.named_parameters() if n.endswith("memory.values.weight")]
    assert 0 < float((weight - table.read(rows)).norm() / weight.norm()) < 0.05
    weight.data = table.read(rows)
    with torch.no_grad():
        assert_close(model(_TOKENS).logits, plain(_TOKENS), LOGITS, "logits")
        low = model.to(torch.bfloat16)
        assert low.model.layers[0].memory.values.scales.dtype == torch.float32
        assert low(_TOKENS).logits.dtype == torch.bfloat16
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    assert "Value tables are" in (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/config.json").read_text())["auto_map"]
    assert (tmp_path / "out/quantized_ultramem.py").exists()
    with pytest.raises(UltraMemError, match="its value tables are quantized, which cannot be und"):
        load_hf(tmp_path / "out")
    with pytest.raises(UltraMemError, match="are quantized"):
        main([str(tmp_path / "out"), str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()


def test_what_cannot_be_quantized_is_refused(tmp_path):
    save_hf(_plain(), tmp_path / "hf", HFTokenizer(), "card")
    with pytest.raises(UltraMemError, match=r"--block is 3; values are 8 wide\. Give a divisor"):
        main([str(tmp_path / "hf"), str(tmp_path / "out"), "--block", "3"])
    with pytest.raises(UltraMemError, match="cannot be read"):
        main([str(tmp_path), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UltraMemError, match="already"):
        main([str(tmp_path / "hf"), str(tmp_path / "hf")])
    broken = _table()
    broken[3, 1] = float("nan")
    with pytest.raises(UltraMemError, match="NaN"):
        quantize_table(broken, "int8", 12)
