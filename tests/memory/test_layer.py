"""The layer against the plain reference: outputs and every gradient, for every switch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.closeness import assert_close, relative_error, rounding
from tests.layers import HIDDEN, VARIANTS, small_config, small_layer, sum_lengths
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.reference import reference_layer

EPS = 1e-5
_HALF_PRODUCTS = 3
"""Rounded to half precision one after the other: query, values, their projection."""


def _input(sequence=6, batch=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sequence, batch, HIDDEN, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def _reference(layer, x):
    """Reference output, with gradients to copies of the layer's parameters."""
    state = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    for name, _ in layer.named_parameters():
        state[name].requires_grad_()
    return reference_layer(x, state, layer.config, eps=EPS), state


def _tolerance(layer):
    return rounding(layer.values.weight.dtype, sum_lengths(layer.config))


def _compare(layer):
    tolerance = _tolerance(layer)
    x = _input(dtype=layer.values.weight.dtype)
    x_ref = x.detach().clone().requires_grad_()
    out, (expected, state) = layer(x), _reference(layer, x_ref)
    assert_close(out, expected, tolerance, "output")
    assert out.norm() > 0
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    out.backward(grad.to(out.dtype))
    expected.backward(grad.to(out.dtype))
    assert_close(x.grad, x_ref.grad, tolerance, "input gradient")
    for name, parameter in layer.named_parameters():
        assert parameter.grad.norm() > 0, f"{name} gets no gradient"
        assert_close(parameter.grad, state[name].grad, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_equals_reference_in_float64(variant):
    _compare(small_layer(**VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_equals_reference_in_float32(variant):
    _compare(small_layer(torch.float32, **VARIANTS[variant]))


@settings(max_examples=40, deadline=None)
@given(
    num_keys=st.integers(2, 9),
    heads=st.integers(1, 4),
    share=st.booleans(),
    rank=st.integers(1, 4),
    full=st.booleans(),
    cores=st.integers(1, 4),
    root=st.integers(1, 3),
    width=st.integers(1, 4),
    topk=st.integers(1, 8),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
)
def test_layer_equals_reference_for_random_sizes(
    num_keys, heads, share, rank, full, cores, root, width, topk, norm
):
    sizes = {
        "num_keys": num_keys,
        "share_query": share,
        "tucker_rank": rank,
        "cores": cores,
        "heads": heads,
        "key_dim": rank * (width + 2),
        "rank_layout": "full" if full else "split",
        "value_expansion": root**2,
        "value_dim": cores * width,
        "topk": min(topk, root * num_keys),
        "qk_norm": norm,
    }
    layer = small_layer(**sizes)
    x = _input(sequence=3, batch=1)
    assert_close(layer(x), _reference(layer, x)[0], _tolerance(layer))


def test_half_precision_stays_near_float64():
    for dtype in (torch.bfloat16, torch.float16):
        # All values are read, so that rounding cannot change which ones.
        exact = small_layer(num_keys=2, topk=2, value_expansion=1, heads=1)
        layer = small_layer(dtype, num_keys=2, topk=2, value_expansion=1, heads=1)
        x = _input()
        assert relative_error(layer(x.to(dtype)), exact(x)) < rounding(dtype, _HALF_PRODUCTS)


def test_autocast_stays_near_float64():
    """All values are read; without norms queries are half precision and keys are not."""
    for norm in ("none", "layernorm"):
        sizes = {"num_keys": 2, "topk": 2, "value_expansion": 1, "heads": 1, "qk_norm": norm}
        exact, layer, x = small_layer(**sizes), small_layer(torch.float32, **sizes), _input()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x.float())
        out.float().sum().backward()
        assert layer.retrieval.keys.weight.grad.norm() > 0
        assert relative_error(out, exact(x)) < rounding(torch.bfloat16, _HALF_PRODUCTS)


def test_any_leading_shape():
    layer = small_layer()
    x = _input(6, 3)
    expected = layer(x)
    assert torch.equal(layer(x.reshape(18, HIDDEN)), expected.reshape(18, HIDDEN))
    assert torch.equal(layer(x.reshape(2, 3, 3, HIDDEN)), expected.reshape(2, 3, 3, HIDDEN))
    assert layer(x[:0]).shape == (0, 3, HIDDEN)
    assert_close(layer(x[:1, :1]), expected[:1, :1], _tolerance(layer))


def test_convolution_is_causal_and_continues_from_history():
    layer = small_layer(query_conv_kernel=4)
    x = _input(8, 2).detach()
    whole = layer(x)
    changed = x.clone()
    changed[5] += 1
    assert torch.equal(layer(changed)[:5], whole[:5])
    assert relative_error(layer(changed)[5], whole[5]) > 1e-3
    assert_close(layer(x[5:], x[2:5].unsqueeze(0)), whole[5:], _tolerance(layer))


def test_filter_is_used_as_stored_and_updated_on_request():
    layer = small_layer()
    before = layer(_input()).detach()
    with torch.no_grad():
        layer.retrieval.cores.weight.copy_(
            torch.randn(layer.retrieval.cores.weight.shape, dtype=torch.float64)
        )
    stored = layer.retrieval.cores.u.clone()
    layer(_input())
    assert torch.equal(layer.retrieval.cores.u, stored)
    layer.after_step()
    assert not torch.equal(layer.retrieval.cores.u, stored)
    assert relative_error(layer(_input()), before) > 1e-3


def test_loading_refuses_a_table_with_nan():
    layer = small_layer(torch.float32, layer_number=4)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["values.weight"][3, 2] = float("nan")
    state["values.weight"][9] = float("inf")
    with pytest.raises(UltraMemError, match=r"layer 4 holds NaN or infinity in 2 of its 49 rows"):
        layer.load_state_dict(state)


def test_casting_to_half_precision_keeps_the_filter_exact():
    layer = small_layer(torch.float32)
    u = layer.retrieval.cores.u.clone()
    assert layer.bfloat16().retrieval.cores.u.dtype == torch.float32
    assert torch.equal(layer.retrieval.cores.u, u)
    assert layer.values.weight.dtype == torch.bfloat16
    assert layer.double().retrieval.cores.u.dtype == torch.float64


def test_statistics_are_recorded_in_training_forwards_only():
    layer = small_layer()
    layer.eval()(_input())
    with torch.no_grad():
        layer.train()(_input())
    assert layer.statistics.take()[0] == 0
    layer(_input())
    forwards, sums, hits = layer.statistics.take()
    assert forwards == 1
    assert hits.sum() == 18 * 10
    assert torch.isfinite(sums).all()
    assert layer.statistics.take() == (0, None, None)


def test_wrong_configuration_is_refused_at_construction():
    with pytest.raises(UltraMemError, match="--ultramem-value-expansion is 3"):
        UltraMemLayer(small_config(value_expansion=3), hidden_size=HIDDEN, num_layers=2)


@pytest.mark.parametrize("changes", [{}, {"retrieval": "pkm", "tucker_rank": 1, "cores": 1}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_prepared_for_inference_it_computes_the_same_until_it_is_trained(dtype, changes):
    layer = small_layer(dtype, **changes).eval()
    x = _input().to(dtype)
    before, names = layer(x), set(layer.state_dict())
    layer.prepare_for_inference()
    assert torch.equal(layer(x), before)
    assert set(layer.state_dict()) == names
    with torch.no_grad():
        layer.retrieval.keys.weight.neg_()
    assert torch.equal(layer(x), before)  # keys are not looked at again...
    layer.train()
    assert not torch.equal(layer(x), before)  # ...until training begins


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_multiplied_beforehand_give_the_same_output(variant):
    layer, x = small_layer(**VARIANTS[variant]).eval(), _input().detach()
    expected, names = layer(x), set(layer.state_dict())
    if not layer.config.value_projection:
        with pytest.raises(UltraMemError, match="values of this model have no projection"):
            layer.prepare_for_inference(premultiply=True)
        return
    if layer.config.values != "pooled":
        with pytest.raises(UltraMemError, match="are not pooled by their scores alone"):
            layer.prepare_for_inference(premultiply=True)
        return
    layer.prepare_for_inference(premultiply=True)
    assert set(layer.state_dict()) == names
    with torch.no_grad():
        layer.value_proj.weight.zero_()  # not looked at again...
    assert_close(layer(x), expected, _tolerance(layer))
    layer.train()
    assert not layer(x).any()  # ...until training begins


def test_a_table_too_large_to_be_multiplied_is_refused(monkeypatch):
    def fails(*_sizes):
        raise RuntimeError("[enforce fail] not enough memory: you tried to allocate 1 bytes")

    layer = small_layer()
    monkeypatch.setattr(torch.Tensor, "new_empty", fails)
    with pytest.raises(UltraMemError, match=r"196 virtual values of width 48 take 0\.0 GB"):
        layer.prepare_for_inference(premultiply=True)
