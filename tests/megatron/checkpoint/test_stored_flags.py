"""Which of the flags stored in a checkpoint are believed."""

from argparse import Namespace

import pytest
import torch

from tests.ranks import RanksFailed, run_on_ranks
from ultramem_megatron.faults.trust import TRUST

_MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "swiglu": True,
    "params_dtype": torch.bfloat16,
    "ultramem_spans": "1:2",
    "ultramem_query_centering": None,
    "tokenizer_model": "words",
    "moe_layer_freq": [1],
}


def _believed(stored):
    from ultramem_megatron.megatron.checkpoint.stored_flags import believed

    return vars(believed(stored, "iter_0000003"))


def test_what_describes_the_model_is_taken_and_nothing_else():
    others = {
        "trust_remote_code": True,
        "save": "/elsewhere",
        "config_logger_dir": "/elsewhere",
        "metadata_path": "m.json",
        "tensor_model_parallel_size": 4,
        "unheard_of": object,
        "spec": None,
    }
    stored = Namespace(**_MODEL, **others)
    assert run_on_ranks(1, _believed, stored) == [_MODEL]
    assert run_on_ranks(1, _believed, stored, env={TRUST: "1"}) == [{**_MODEL, **others}]


def test_flags_from_before_a_default_say_what_it_was_then():
    older = Namespace(ultramem_spans="1:2")
    believed = run_on_ranks(1, _believed, older)[0]
    assert believed["ultramem_query_centering"] is False
    assert believed["ultramem_value_lr_mult"] == 10.0  # the default then
    assert "ultramem_query_centering" not in run_on_ranks(1, _believed, Namespace(num_layers=2))[0]


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (Namespace(spec=["a.module", "x"]), "needs code or files named in it .spec is"),
        (Namespace(fp8_quantizer_factory="a.b"), "fp8_quantizer_factory is 'a.b'"),
        (Namespace(heterogeneous_layers_config_path="/x"), "heterogeneous_layers_config_path"),
        (Namespace(num_layers=torch.ones(1)), "its flag num_layers is no plain data, but a Tensor"),
        (Namespace(window_size=[1, {"a": print}]), "its flag window_size is no plain data"),
        ({"num_layers": 2}, "its flags are a dict, not what Megatron stores"),
    ],
)
def test_code_and_what_is_no_data_are_refused(stored, message):
    with pytest.raises(RanksFailed, match=message) as refused:
        run_on_ranks(1, _believed, stored)
    assert f"set {TRUST}=1" in str(refused.value)
