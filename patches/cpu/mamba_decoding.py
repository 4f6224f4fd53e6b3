"""Decoding of Mamba layers without mamba-ssm: the scan in PyTorch goes on from a context's states.

Static batching keeps two tensors for each layer, dynamic batching places of requests in two of all.

b texts, l positions, h heads, p width of a head, D hidden.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ultramem_megatron.patches.cpu.mamba_scan import States, from_states, without_kernels
from ultramem_megatron.patches.patch import Editor, Patch

_MIXER = "megatron.core.ssm.mamba_mixer.MambaMixer"


def _ssm_prefill(
    self: Any,
    zxBCdt: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    *_: Any,
    **__: Any,
) -> Tensor:
    """Of static batching, or without states: (l, b, ...) to (l, b, h * p), normed."""
    states = None if conv_state is None or ssm_state is None else (conv_state, ssm_state)
    y = self.cp.post_conv_ssm(_went_on(self, zxBCdt.transpose(0, 1), states).transpose(0, 1))
    normed: Tensor = self.norm(y)
    return normed


def _ssm_decode(
    self: Any, zxBCdt: Tensor, conv_state: Tensor, ssm_state: Tensor, *_: Any, **__: Any
) -> Tensor:
    """One more token of each text, (b, 1, ...) to (b, 1, h * p), normed."""
    normed: Tensor = self.norm(_went_on(self, zxBCdt, (conv_state, ssm_state)))
    return normed


def _dynamic_inference(self: Any, hidden_states: Tensor, context: Any) -> tuple[Tensor, Any]:
    """A step of dynamic batching, (tokens, 1, D): decoding requests come first, one token each."""
    conv, ssm = context.mamba_states_cache(self.layer_number - self.pp_layer_offset)
    zxbcdt, _ = self.in_proj(hidden_states)
    y = zxbcdt.new_zeros(*zxbcdt.shape[:2], self.d_inner_local_tp)
    for start, end, slot in _pieces_of_requests(context):
        states = conv[slot : slot + 1], ssm[slot : slot + 1]
        y[start:end] = _went_on(self, zxbcdt[start:end].transpose(0, 1), states).transpose(0, 1)
    out, bias = self.out_proj(self.norm(y))
    return out, bias


def _pieces_of_requests(context: Any) -> Iterator[tuple[int, int, int]]:
    """First token, the one behind the last, and the place of its states, of each request."""
    assert not context.num_speculative_tokens, "speculative decoding needs Mamba's kernels"
    metadata, dims = context.mamba_metadata, context.padded_batch_dimensions
    decoding = dims.decode_req_count
    starts = range(decoding)
    places = metadata.batch_indices_decode[:decoding].tolist() if decoding else []
    yield from ((at, at + 1, slot) for at, slot in zip(starts, places, strict=True) if slot >= 0)
    if dims.prefill_req_count:
        ends = [decoding + end for end in metadata.cu_seqlens.tolist()]
        places = metadata.batch_indices_prefill.tolist()
        for start, end, slot in zip(ends[:-1], ends[1:], places, strict=True):
            if slot >= 0:
                yield start, end, slot


def _went_on(self: Any, zxbcdt_bld: Tensor, states: States | None) -> Tensor:
    """A MambaMixer's `from_states`, whose states are kept where they are."""
    cp = self.cp
    weights = (
        cp.get_conv1d_weight()[:, 0],
        cp.get_conv1d_bias(),
        cp.get_dt_bias().float(),
        -cp.get_A_log().float().exp(),
        cp.get_D(),
    )
    y, after = from_states(
        zxbcdt_bld, weights, self.chunk_size, self.headdim, cp.ngroups_local_tpcp, states
    )
    if states is not None:
        for kept, new in zip(states, after, strict=True):
            kept.copy_(new)
    return y


def _install(editor: Editor) -> None:
    for method in (_ssm_prefill, _ssm_decode, _dynamic_inference):
        editor.replace(f"{_MIXER}.{method.__name__}", method)


PATCH = Patch(
    name="cpu.mamba_decoding",
    symbols=tuple(
        f"{_MIXER}.{name}" for name in ("_ssm_prefill", "_ssm_decode", "_dynamic_inference")
    ),
    reason="MambaMixer decodes with kernels of mamba-ssm, and with Triton's of its own.",
    delete_when="MambaMixer has a path in PyTorch for decoding.",
    install=_install,
    active=without_kernels,
    versions=">=0.19,<0.20",
)
