"""UltraMemV2, Memory+ and PEER: what their authors' code gave, and other sizes token by token."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import ROOT
from tests.closeness import assert_close
from tests.memory.authors import slow
from tests.memory.authors.sketch import sketch
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory import convert
from ultramem_megatron.memory.foreign import ForeignMemories
from ultramem_megatron.memory.layer import memory_layers

TOLERANCE = 1e-10  # float64, of sums of at most a few thousand products, some of which cancel
LOADERS = {
    "official_v2_a": convert.load_official_v2,
    "memory_plus_a": convert.load_memory_plus,
    "peer_a": convert.load_peer,
}
V2: dict[str, Any] = {
    "hidden_size": 6,
    "knum": 4,
    "kdim": 4,
    "vdim": 6,
    "pre_vdim": 5,
    "knn": 3,
    "head": 1,
    "tucker_rank": 2,
    "tucker_multihead": 2,
    "mem_layer_num": 3,
    "share_ratio": 0.5,
    "key_expand_time": 2,
    "value_expand_time": 1,
    "layer_norm_eps": 1e-5,
    "norm": "rms",
    "q_for_each_tucker_rank": True,
    "use_glu_act": False,
}
PLUS = {
    "dim": 6,
    "mem_n_keys": 5,
    "mem_heads": 2,
    "mem_knn": 3,
    "mem_k_dim": 6,
    "mem_v_dim": -1,
    "swilu_projection": True,
    "mem_gated": False,
    "peer_variant": False,
    "mem_share_values": True,
}
PEER = {
    "dim": 6,
    "heads": 2,
    "num_experts": 25,
    "num_experts_per_head": 3,
    "dim_key": 4,
    "product_key_topk": 3,
    "separate_embed_per_head": False,
    "pre_rmsnorm": False,
    "non_competing_scores": False,
    "activation": "gelu",
}


def _part(golden: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): golden[n] for n in golden if n.startswith(prefix)}


@pytest.mark.parametrize("name", LOADERS)
def test_outputs_and_gradients_are_those_of_the_authors_code(name: str) -> None:
    golden = dict(np.load(ROOT / "tests" / "golden" / f"{name}.npz"))
    memories = LOADERS[name](_part(golden, "sd."), _part(golden, "cfg."))
    shape = (len(memories.layers), -1, *golden["input"].shape[-2:])
    x = torch.from_numpy(golden["input"]).view(shape).requires_grad_()
    grad_output = torch.from_numpy(golden["grad_output"]).view(shape)
    out = torch.stack([layer(one) for layer, one in zip(memories.layers, x, strict=True)])
    out.backward(grad_output)
    assert x.grad is not None
    found: dict[str, Tensor] = {"output": out.detach(), "grad_input": x.grad}
    found |= {f"grad.{n}": g for n, g in memories.authors_gradients().items()}
    expected = {n for n in golden if n in ("output", "grad_input") or n.startswith("grad.")}
    assert found.keys() == expected
    for label, tensor in found.items():
        ours = torch.from_numpy(sketch(tensor.numpy()))
        assert_close(ours, torch.from_numpy(golden[label]), TOLERANCE, label)
    for theirs, tensor in memories.authors_state().items():
        assert np.array_equal(tensor.numpy(), golden[f"sd.{theirs}"]), theirs
        assert tensor.numpy().dtype == golden[f"sd.{theirs}"].dtype, theirs


def _agree(
    memories: ForeignMemories, state: dict[str, Tensor], token: Callable[..., Tensor], count: int
) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = next(p.shape[1] for n, p in memories.named_parameters() if n.endswith("proj.weight"))
    x = torch.randn(count, 1, 3, hidden, generator=generator, dtype=torch.float64)
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    for name in memories.authors_gradients():
        state[name].requires_grad_()
    slowly = torch.stack(
        [
            torch.stack([token(one, state, place) for one in x_l[0]])[None]
            for place, x_l in enumerate(plain)
        ]
    )
    (slowly * weights).sum().backward()
    out = torch.stack([layer(one) for layer, one in zip(memories.layers, ours, strict=True)])
    (out * weights).sum().backward()
    assert_close(out.detach(), slowly.detach(), TOLERANCE, "output")
    assert ours.grad is not None
    assert plain.grad is not None
    assert_close(ours.grad, plain.grad, TOLERANCE, "grad_input")
    for name, gradient in memories.authors_gradients().items():
        expected = state[name].grad
        if expected is None:  # read by nothing
            assert not gradient.any(), name
        else:
            assert_close(gradient, expected, TOLERANCE, name)
    assert memories.authors_state().keys() == state.keys()
    for name, tensor in memories.authors_state().items():
        assert torch.equal(tensor, state[name].detach()), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head": 2, "value_expand_time": 4},
        {"head": 4, "norm": "ln", "tucker_multihead": 3},
        {"share_ratio": 1.0, "key_expand_time": 1},
        {"share_ratio": 1 / 3, "tucker_multihead": 1},
        {"share_ratio": 0.2, "use_glu_act": True},
        {"pre_vdim": 0, "head": 2},
        {"mem_layer_num": 1, "share_ratio": 1.0, "key_expand_time": 1},
        {"q_for_each_tucker_rank": False, "tucker_rank": 3, "head": 2},
        {"q_for_each_tucker_rank": False, "tucker_rank": 1, "knn": 4},
        {"head": 3, "norm": "rms", "bias_for_layer_norm": True, "hidden_size": 7},
        {"knn": 1, "norm": "ln", "bias_for_layer_norm": True, "vdim": 2, "pre_vdim": 1},
    ],
    ids=str,
)
def test_ultramem_v2_is_its_formulas(changes: dict[str, Any]) -> None:
    cfg = V2 | changes
    state = slow.v2_weights(cfg)
    memories = convert.load_official_v2(state, cfg)
    _agree(memories, state, lambda x, s, n: slow.v2_token(x, s, cfg, n), cfg["mem_layer_num"])


@pytest.mark.parametrize("owner", [2, 7])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mem_v_dim": 4, "mem_heads": 3},
        {"swilu_projection": False},
        {"swilu_projection": False, "mem_v_dim": 4, "mem_gated": True},
        {"mem_gated": True, "mem_share_values": False},
        {"peer_variant": True, "mem_gated": True},
        {"peer_variant": True, "swilu_projection": False},
        {"mem_share_values": False, "mem_v_dim": 9},
        {"mem_knn": 1, "mem_heads": 5, "dim": 7},
    ],
    ids=str,
)
def test_memory_plus_is_its_formulas(changes: dict[str, Any], owner: int) -> None:
    cfg, layers = PLUS | changes, [2, 7]
    state = slow.plus_weights(cfg, layers, owner)
    memories = convert.load_memory_plus(state, cfg)
    _agree(memories, state, lambda x, s, n: slow.plus_token(x, s, cfg, layers[n], owner), 2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"separate_embed_per_head": True, "activation": "ReLU", "heads": 3},
        {"pre_rmsnorm": True, "activation": "SiLU"},
        {"non_competing_scores": True, "pre_rmsnorm": True, "separate_embed_per_head": True},
        {"product_key_topk": 2, "num_experts_per_head": 4, "activation": "tanh"},
        {"product_key_topk": 5, "heads": 1},
        {"product_key_topk": 1, "num_experts_per_head": 1, "heads": 3, "dim_key": 1},
    ],
    ids=str,
)
def test_peer_is_its_formulas(changes: dict[str, Any]) -> None:
    cfg = PEER | changes
    state = slow.peer_weights(cfg)
    _agree(convert.load_peer(state, cfg), state, lambda x, s, n: slow.peer_token(x, s, cfg), 1)


def test_an_activation_may_be_given_as_its_class() -> None:
    state = slow.peer_weights(PEER)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    by_class, by_name = (
        convert.load_peer(state, PEER | {"activation": one}) for one in (torch.nn.SiLU, "SiLU")
    )
    assert torch.equal(by_class.layers[0](x), by_name.layers[0](x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tucker_rank": 3}, "tucker_rank is 3; it must be 2"),
        ({"head": 5}, "head is 5; it must be from 1 to 4"),
        ({"value_expand_time": 2}, "value_expand_time is 2; it must be 1 or key_expand_time"),
        ({"share_ratio": 1.5}, "share_ratio is 1.5"),
        ({"share_ratio": 0.9}, "keys a side; knum, mem_layer_num, share_ratio"),
        ({"norm": "batch"}, "norm 'batch' is unknown"),
        ({"vdim": 7}, r"has shape \(48, 6\), but the sizes given imply \(48, 7\)"),
        ({"hidden_size": 8}, "has shape"),
        ({"pre_vdim": 0}, "not expected full_memory_layer.pre_values_for_look_up"),
        ({"vertical_parallel": True}, "cut by columns"),
        ({"mem_output_dropout_rate": 0.1}, "dropout is not supported"),
    ],
    ids=str,
)
def test_what_ultramem_v2_does_not_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UltraMemError, match=message):
        convert.load_official_v2(slow.v2_weights(V2), V2 | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mem_heads": 1}, "mem_heads is 1; it must be at least 2"),
        ({"mem_k_dim": 5}, "mem_k_dim is 5; it must be even"),
        ({"mem_query_batchnorm": True}, "others of its batch"),
        ({"peer_variant": True, "mem_v_dim": 6}, "mem_v_dim is 6; it must be -1"),
        ({"mem_share_values": False}, "1 of 2 memories have values.weight"),
        ({"mem_n_keys": 6}, "has shape"),
        ({"mem_gated": True}, "missing layers.2.feed_forward.gating.bias"),
    ],
    ids=str,
)
def test_what_memory_plus_does_not_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UltraMemError, match=message):
        convert.load_memory_plus(slow.plus_weights(PLUS, [2, 7], 2), PLUS | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 24}, "num_experts is 24; it must be a square"),
        ({"activation": "PReLU"}, "activation is PReLU; it must be one of"),
        ({"pre_rmsnorm": True}, "missing norm.gamma"),
        ({"product_key_topk": 6}, "more than the 5 keys"),
        ({"dropout": 0.1}, "dropout is not supported"),
    ],
    ids=str,
)
def test_what_peer_does_not_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UltraMemError, match=message):
        convert.load_peer(slow.peer_weights(PEER), PEER | changes)


def test_a_table_stored_at_two_memories_is_one_and_comes_back_at_both() -> None:
    state = slow.plus_weights(PLUS, [2, 7], 2)
    table = "layers.{}.feed_forward.values.weight"
    state[table.format(7)] = state[table.format(2)].clone()
    memories = convert.load_memory_plus(state, PLUS)
    tables = [layer.values.weight for layer in memory_layers(memories)]
    assert tables[0] is tables[1]
    assert memories.authors_state().keys() == state.keys()
    state[table.format(7)][0, 0] += 1
    with pytest.raises(UltraMemError, match="2 have it, and they differ"):
        convert.load_memory_plus(state, PLUS)
