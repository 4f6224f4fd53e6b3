"""What else transformers and PyTorch do with a model that is not trained further."""

import pytest
import torch

from tests.closeness import assert_close
from tests.decoding import LOGITS
from tests.tools.export.test_hf_training import small_model
from ultramem_megatron.tools.export.hf_folder import hf_model

_IDS = torch.randint(61, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["tdqkr", "ultramemv2"])
def test_its_own_first_layers_draft_what_it_writes(name):
    """A span that ends behind them is left out of the draft."""
    model = hf_model(small_model(name)).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(_IDS[:1], **options)
    for layers in (1, 2):
        drafted = model.generate(_IDS[:1], assistant_early_exit=layers, **options)
        assert torch.equal(drafted, wanted)
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ["tdqkr", pytest.param("peer", marks=pytest.mark.long)])
def test_an_exported_graph_takes_other_batches_and_lengths(name):
    model = hf_model(small_model(name)).eval()
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    graph = torch.export.export(
        model,
        (_IDS.clone(),),
        {"use_cache": False},
        dynamic_shapes={"input_ids": any_size, "use_cache": None},
        strict=False,
    ).module()
    others = torch.arange(22).view(2, 11)
    with torch.no_grad():
        found, wanted = (run(others, use_cache=False).logits for run in (graph, model))
    assert_close(found, wanted, LOGITS)
