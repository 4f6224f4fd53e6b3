"""Mamba layers in PyTorch, against Hugging Face's Mamba-2 and against the recurrence itself."""

import torch
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from tests.closeness import assert_close, rounding
from ultramem_megatron.patches.cpu.mamba_scan import (
    GroupedRMSNorm,
    from_states,
    selective_scan,
    split_conv1d_scan,
)

_BATCH, _LENGTH, _HEADS, _WIDTH, _STATES, _GROUPS = 2, 21, 8, 4, 6, 2


def _recurrence(x, step, decay, b, c):
    state, out = torch.zeros(_BATCH, _HEADS, _WIDTH, _STATES, dtype=x.dtype), []
    for at in range(_LENGTH):
        kept = (step[:, at] * decay).exp()[..., None, None] * state
        state = kept + torch.einsum("bhp,bhn,bh->bhpn", x[:, at], b[:, at], step[:, at])
        out.append(torch.einsum("bhpn,bhn->bhp", state, c[:, at]))
    return torch.stack(out, 1)


def test_chunks_compute_the_recurrence():
    torch.manual_seed(0)
    like = {"dtype": torch.float64}
    x = torch.randn(_BATCH, _LENGTH, _HEADS, _WIDTH, **like)
    b, c = torch.randn(2, _BATCH, _LENGTH, _HEADS, _STATES, **like)
    step, decay = torch.rand(_BATCH, _LENGTH, _HEADS, **like), -torch.rand(_HEADS, **like)
    expected = _recurrence(x, step, decay, b, c)
    for chunk in (1, 8, 128):
        found, _ = selective_scan(x, step, decay, b, c, chunk)
        assert_close(found, expected, rounding(torch.float64, _LENGTH * _STATES), f"chunk {chunk}")


def test_pieces_go_on_from_the_states_of_those_before():
    torch.manual_seed(0)
    inner, channels = _HEADS * _WIDTH, _HEADS * _WIDTH + 2 * _GROUPS * _STATES
    zxbcdt = torch.randn(_BATCH, _LENGTH, inner + channels + _HEADS)
    weights = (
        torch.randn(channels, 4),
        torch.randn(channels),
        torch.randn(_HEADS),
        -torch.rand(_HEADS),
        torch.randn(_HEADS),
    )
    whole, _ = from_states(zxbcdt, weights, 8, _WIDTH, _GROUPS, None)
    found, states = [], None
    for piece in zxbcdt.split([2, 1, 1, 10, 1, 6], 1):
        y, states = from_states(piece, weights, 8, _WIDTH, _GROUPS, states)
        found.append(y)
    assert_close(torch.cat(found, 1), whole, rounding(torch.float32, 256, condition=8))


def _mixer():
    config = Mamba2Config(
        hidden_size=16,
        expand=2,
        num_heads=_HEADS,
        head_dim=_WIDTH,
        state_size=_STATES,
        n_groups=_GROUPS,
        chunk_size=8,
        layer_norm_epsilon=1e-5,
    )
    torch.manual_seed(0)
    mixer = Mamba2Mixer(config, 0).eval()  # in training it would look for kernels
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def _ours(mixer, x):
    y = split_conv1d_scan(
        mixer.in_proj(x),
        mixer.conv1d.weight[:, 0],
        mixer.conv1d.bias,
        mixer.dt_bias,
        -mixer.A_log.exp(),
        D=mixer.D,
        chunk_size=8,
        headdim=_WIDTH,
        ngroups=_GROUPS,
        activation="silu",
    )
    norm = GroupedRMSNorm(y.shape[-1], eps=1e-5, group_size=y.shape[-1] // _GROUPS)
    norm.weight = mixer.norm.weight
    return mixer.out_proj(norm(y))


def _with_gradients(mixer, forward, x):
    mixer.zero_grad()
    out = forward(x)
    out.square().sum().backward()
    return {"output": out} | {name: p.grad.clone() for name, p in mixer.named_parameters()}


def test_the_mixer_is_mamba_2s_with_all_gradients():
    mixer = _mixer()
    x = torch.randn(_BATCH, _LENGTH, 16)
    expected = _with_gradients(mixer, mixer, x)
    found = _with_gradients(mixer, lambda x: _ours(mixer, x), x)
    for name, tensor in expected.items():
        assert_close(found[name], tensor, rounding(torch.float32, 256, condition=8), name)
