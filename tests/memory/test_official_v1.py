"""Layers of the authors' code: outputs and gradients of theirs, and the way there and back."""

import numpy as np
import pytest
import torch

from tests import ROOT
from tests.closeness import assert_close, rounding
from tests.layers import small_layer, sum_lengths
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.official_v1 import export_official_v1, load_official_v1

GOLDEN = np.load(ROOT / "tests" / "golden" / "official_v1_a.npz")


def _golden_state(dtype):
    state = {
        name.removeprefix("sd."): torch.from_numpy(GOLDEN[name])
        for name in GOLDEN.files
        if name.startswith("sd.")
    }
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}


def _load(state):
    return load_official_v1(
        state,
        topk=int(GOLDEN["cfg.knn"]),
        norm=str(GOLDEN["cfg.norm"]),
        eps=float(GOLDEN["cfg.layer_norm_eps"]),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_equal_the_authors(dtype, training):
    layer = _load(_golden_state(dtype)).train(training)
    x = torch.from_numpy(GOLDEN["input"]).to(dtype).requires_grad_()
    out = layer(x)
    out.backward(torch.from_numpy(GOLDEN["grad_output"]).to(dtype))
    theirs = {name: torch.from_numpy(GOLDEN[name]) for name in GOLDEN.files if "cfg" not in name}
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    ours = {
        "output": out,
        "grad_input": x.grad,
        "grad.keys": grads["retrieval.keys.weight"].transpose(-1, -2),
        "grad.values_for_look_up": grads["values.weight"],
        "grad.query_proj.weight": grads["query.proj.weight"],
        "grad.values_proj.weight": grads["value_proj.weight"],
        "grad.query_norm.weight": grads["query.norm.weight"],
        "grad.keys_norm.weight": grads["retrieval.keys.norm.weight"],
        "grad.tucker_core.0": grads["retrieval.cores.weight"][0],
        "grad.tucker_core.1": grads["retrieval.cores.weight"][1],
    }
    tolerance = rounding(dtype, sum_lengths(layer.config, x.shape[-1]))
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name], tolerance, name)


def test_penalty_equals_the_authors():
    layer = _load(_golden_state(torch.float64))
    unscaled = layer.auxiliary_loss() / layer.config.aux_loss_weight
    theirs = torch.tensor(GOLDEN["tucker_aux_unscaled"])
    assert_close(unscaled, theirs, rounding(torch.float64, 100))  # rotations of a 2 x 2 matrix


def test_round_trip_is_exact():
    state = _golden_state(torch.float64)
    exported = export_official_v1(_load(state))
    assert exported.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(exported[name], tensor), name
        assert exported[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("expansion", [1, 9])
def test_our_layers_survive_export_and_import(heads, cores, expansion):
    layer = small_layer(
        heads=heads,
        cores=cores,
        value_expansion=expansion,
        tucker_rank=3,
        rank_layout="full",
        qk_norm="rmsnorm",
        query_centering=False,
    )
    back = load_official_v1(export_official_v1(layer), topk=5, norm="rms", eps=1e-5)
    x = torch.randn(4, 2, 24, dtype=torch.float64)
    assert_close(back(x), layer(x), rounding(x.dtype, sum_lengths(layer.config)))
    assert back.values.weight.ultramem_values


def test_norms_with_bias_and_without_weight():
    state = _golden_state(torch.float64)
    state["query_norm.bias"] = torch.linspace(-1, 1, 16, dtype=torch.float64)
    del state["keys_norm.weight"]
    layer = load_official_v1(state, topk=12, norm="default", eps=1e-5)
    assert isinstance(layer.query.norm, torch.nn.LayerNorm)
    assert torch.equal(layer.query.norm.bias, state["query_norm.bias"])
    exported = export_official_v1(layer)
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], state[name]) for name in state)


def test_a_filter_that_was_never_computed_is_computed():
    state = _golden_state(torch.float64)
    state["tucker_core_u"] = torch.zeros_like(state["tucker_core_u"])
    state["tucker_core_v"] = torch.zeros_like(state["tucker_core_v"])
    layer = _load(state)
    assert_close(
        layer.retrieval.cores.u.norm(dim=-1), torch.ones(2).double(), rounding(torch.float64, 2)
    )


def test_the_given_tensors_are_not_shared():
    state = _golden_state(torch.float64)
    layer = _load(state)
    with torch.no_grad():
        layer.values.weight.zero_()
    assert state["values_for_look_up"].abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("keys"), "keys missing"),
        (lambda s: s.update(shuffle_index=s["shuffle_index"][:-1]), "shuffle_index has shape"),
        (lambda s: s.update(values_for_look_up=s["values_for_look_up"][:-5]), "mixes layers"),
    ],
)
def test_a_wrong_state_dict_is_refused(change, message):
    state = _golden_state(torch.float64)
    change(state)
    with pytest.raises(UltraMemError, match=message):
        _load(state)


def test_an_unknown_norm_is_refused():
    with pytest.raises(UltraMemError, match="norm 'batch' is unknown"):
        load_official_v1(_golden_state(torch.float64), topk=12, norm="batch", eps=1e-5)


def test_a_layer_their_code_lacks_is_refused():
    with pytest.raises(UltraMemError, match="query_conv_kernel=3"):
        export_official_v1(small_layer(query_conv_kernel=3, rank_layout="full"))
    with pytest.raises(UltraMemError, match="takes an UltraMemLayer, not Linear"):
        export_official_v1(torch.nn.Linear(2, 2))
