"""Another number of tokens compiles no kernel anew: what Triton goes by, on the meta device."""

from collections import defaultdict
from unittest.mock import patch

import pytest
import torch

from tests.launch.launches import _layer
from ultramem_megatron.kernels import dispatch

pytest.importorskip("triton", reason="Triton is for Linux")

_TRAINED = ((2048, 4), (8191, 1), (300, 7))  # positions and sequences
_DECODED = ((1, 33), (1, 40), (1, 63))


def _compiled_for(function, args, kwargs):
    """What a variant goes by: constants, dtypes, what is known of addresses and integers."""
    given = {**dict(zip(function.arg_names, args, strict=False)), **kwargs}
    known = [("num_warps", given.get("num_warps"))]
    for parameter in function.params:
        value = given[parameter.name]
        if isinstance(value, torch.Tensor):
            aligned = value.storage_offset() * value.element_size() % 16 == 0
            known.append((parameter.name, value.dtype, aligned))
        elif parameter.is_constexpr:
            known.append((parameter.name, str(value)))
        elif isinstance(value, int) and not parameter.do_not_specialize:
            known.append((parameter.name, value == 1, value % 16 == 0, value >= 2**31))
    return function.fn.__name__, tuple(known)


@pytest.fixture
def layer_and_variants():
    """A layer of the paper's 1.6B model, and variant -> numbers of tokens it was launched for."""
    from triton.runtime.jit import JITFunction

    variants = defaultdict(set)
    layer, _ = _layer(1789, 5, torch.device("meta"), large=True)

    def run(function, *args, grid, warmup, **kwargs):
        variants[_compiled_for(function, args, kwargs)].add(layer.tokens)

    def choose(device, forced):
        return "triton"

    with patch.object(JITFunction, "run", run), patch.object(dispatch, "_choose", choose):
        yield layer, variants


def _step(layer, shape, trains):
    layer.tokens = shape[0] * shape[1]
    x = torch.empty(*shape, 2048, dtype=torch.bfloat16, device="meta", requires_grad=trains)
    output = layer(x)
    if trains:
        output.backward(output.detach())


@pytest.mark.parametrize("deterministic", [False, True])
def test_another_number_of_tokens_compiles_nothing(layer_and_variants, deterministic):
    layer, variants = layer_and_variants
    torch.use_deterministic_algorithms(deterministic)
    try:
        for shape in _TRAINED:
            _step(layer, shape, trains=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(variants) > 12
    everything = {positions * sequences for positions, sequences in _TRAINED}
    assert all(launched == everything for launched in variants.values()), variants
    variants.clear()
    layer.eval()
    with torch.no_grad():
        for shape in _DECODED:
            _step(layer, shape, trains=False)
    assert all(launched == {33, 40, 63} for launched in variants.values()), variants
