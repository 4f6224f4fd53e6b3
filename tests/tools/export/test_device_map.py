"""Parts of a model on other devices, or left in files, compute what they do together."""

import pytest
import torch

from tests.tools.export.test_hf_training import small_model
from ultramem_megatron.tools.export.hf.modeling_ultramem import UltraMemGPTForCausalLM
from ultramem_megatron.tools.export.hf_folder import save_hf
from ultramem_megatron.tools.export.hf_tokenizer import HFTokenizer

_PARTS = (
    "model.embed_tokens",
    *(f"model.layers.{n}" for n in range(3)),
    "model.tables",
    "model.norm",
    "lm_head",
)


@pytest.mark.parametrize("name", ["tdqkr", "ultramemv2"])
def test_parts_are_fetched_where_they_are_used(tmp_path, name):
    save_hf(small_model(name).eval(), tmp_path / "hf", HFTokenizer(), "card")
    tokens = torch.arange(20).unsqueeze(0)
    whole = UltraMemGPTForCausalLM.from_pretrained(tmp_path / "hf")
    for left in ("model.layers", "model.tables"):
        places = {part: "disk" if part.startswith(left) else "cpu" for part in _PARTS}
        model = UltraMemGPTForCausalLM.from_pretrained(
            tmp_path / "hf", device_map=places, offload_folder=tmp_path / "left"
        )
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, whole(tokens).logits)
        for table in model.model.tables:
            assert table.values.weight.is_meta == (left == "model.tables")
