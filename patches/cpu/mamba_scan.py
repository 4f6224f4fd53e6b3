"""Mamba layers without mamba-ssm, whose kernels are Triton's: the same in PyTorch.

MambaMixer stays Megatron's own, with its shards, checkpoints and initial weights. What it calls to
train is replaced: convolution, selective scan and gate in one function, and the norm after it.

b batch, l and m positions, h heads, p width of a head, g groups, n width of a state, w taps of the
convolution, c its channels. Computed in float32, as the kernels do.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad, silu, softplus

from ultramem_megatron.patches.cpu.devices import without_cuda
from ultramem_megatron.patches.patch import Editor, Patch

_MIXER = "megatron.core.ssm.mamba_mixer"


States = tuple[Tensor, Tensor]
"""Of several texts: the last inputs of the convolution (b, c, w), and s_l (b, h, p, n)."""


def selective_scan(
    x_blhp: Tensor,
    step_blh: Tensor,
    decay_h: Tensor,
    b_blhn: Tensor,
    c_blhn: Tensor,
    chunk: int,
    state_bhpn: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_l = c_l . s_l with s_l = exp(step_l decay) s_(l-1) + step_l b_l x_l, chunk by chunk.

    Within a chunk every position looks at every one before it, as attention would; from chunk to
    chunk only the state goes on (Mamba-2, arXiv 2405.21060, section 6). state_bhpn: s before the
    first position, None for zeros. Returns y (b, l, h, p) and the last s.
    """
    batch, length, heads, width = x_blhp.shape
    if state_bhpn is None:
        state_bhpn = x_blhp.new_zeros(batch, heads, width, b_blhn.shape[-1])
    out = []
    for at in range(0, length, chunk):
        part = slice(at, at + chunk)
        b, c, step = b_blhn[:, part], c_blhn[:, part], step_blh[:, part]
        u = x_blhp[:, part] * step[..., None]
        log_blh = (step * decay_h).cumsum(1)
        y = torch.einsum("blmh,bmhp->blhp", _within(b, c, log_blh), u)
        y = y + torch.einsum("blhn,bhpn,blh->blhp", c, state_bhpn, log_blh.exp())
        left = (log_blh[:, -1:] - log_blh).exp()
        added = torch.einsum("bmhn,bmhp,bmh->bhpn", b, u, left)
        state_bhpn = state_bhpn * log_blh[:, -1].exp()[..., None, None] + added
        out.append(y)
    return torch.cat(out, 1), state_bhpn


def _within(b_blhn: Tensor, c_blhn: Tensor, log_blh: Tensor) -> Tensor:
    """What position l takes of position m <= l of its chunk: (b, l, m, h)."""
    count = log_blh.shape[1]
    later = torch.ones(count, count, dtype=torch.bool, device=log_blh.device).triu(1)
    between = log_blh[:, :, None] - log_blh[:, None]
    decay = between.masked_fill(later[:, :, None], float("-inf")).exp()
    return torch.einsum("blhn,bmhn->blmh", c_blhn, b_blhn) * decay


def split_conv1d_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    *,
    headdim: int,
    ngroups: int,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """mamba_split_conv1d_scan_combined as MambaMixer calls it, without norm and output projection.

    zxbcdt: (b, l, ...) the input projection: gate z, input x, b, c, step. conv1d_weight: (channels
    of x, b and c, taps). dt_bias, A, D: (h). Returns (b, l, h * p).
    """
    assert seq_idx is None, "packed documents need Transformer Engine"
    weights = conv1d_weight, conv1d_bias, dt_bias, A, D
    return from_states(zxbcdt, weights, chunk_size, headdim, ngroups, None)[0]


def from_states(
    zxbcdt: Tensor,
    weights: tuple[Tensor, ...],
    chunk_size: int,
    headdim: int,
    ngroups: int,
    before: States | None,
) -> tuple[Tensor, States]:
    """As `split_conv1d_scan`, after what was `before` (None: nothing); and what is after it."""
    conv1d_weight, conv1d_bias, dt_bias, A, D = weights
    heads, states = len(A), (len(conv1d_weight) - len(A) * headdim) // (2 * ngroups)
    inner, shared = heads * headdim, ngroups * states
    z, xbc, step = zxbcdt.float().split([inner, inner + 2 * shared, heads], -1)
    seen = _with_inputs(None if before is None else before[0], xbc, conv1d_weight.shape[1])
    mixed = silu(_convolved(seen, conv1d_weight, conv1d_bias))
    x, b, c = mixed.split([inner, shared, shared], -1)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (
        t.unflatten(-1, (ngroups, states)).repeat_interleave(heads // ngroups, 2) for t in (b, c)
    )
    state = None if before is None else before[1].float()
    y, state = selective_scan(x, softplus(step + dt_bias), A, b, c, chunk_size, state)
    y = (y + x * D.float()[:, None]).flatten(2)
    return (y * silu(z)).to(zxbcdt.dtype), (seen[..., -conv1d_weight.shape[1] :], state)


def _with_inputs(before_bcw: Tensor | None, x_blc: Tensor, taps: int) -> Tensor:
    """Inputs (b, c, taps + l) of the convolution: zeros or those before, and x."""
    x_bcl = x_blc.transpose(1, 2)
    return pad(x_bcl, (taps, 0)) if before_bcw is None else torch.cat([before_bcw, x_bcl], 2)


def _convolved(seen_bcl: Tensor, weight_cw: Tensor, bias_c: Tensor) -> Tensor:
    """A causal depthwise convolution, (b, l, c); l counts from the inputs' place w."""
    weight, bias = weight_cw.float()[:, None], bias_c.float()
    return conv1d(seen_bcl[..., 1:].float(), weight, bias, groups=len(bias)).transpose(1, 2)


class GroupedRMSNorm(nn.Module):
    """RMSNorm of each group of channels for itself, with one gain each; its shards as upstream's.

    weight: (width), sharded over tensor-parallel ranks.
    """

    tp_group: Any

    def __init__(
        self,
        width: int,
        *,
        eps: float,
        group_size: int,
        norm_before_gate: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert not norm_before_gate, "the gate comes first, in the scan"
        self.eps, self.group_size = eps, group_size
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width), any floating type."""
        groups = x.float().unflatten(-1, (-1, self.group_size))
        scale = (groups.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return ((groups * scale).flatten(-2) * self.weight.float()).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """As ExtendedRMSNorm's."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def _install(editor: Editor) -> None:
    editor.replace(f"{_MIXER}.HAVE_MAMBA_SSM", True)
    editor.replace(f"{_MIXER}.mamba_split_conv1d_scan_combined", split_conv1d_scan)
    editor.replace(f"{_MIXER}.ExtendedRMSNorm", GroupedRMSNorm)


def without_kernels() -> bool:
    return without_cuda() and importlib.util.find_spec("mamba_ssm") is None


PATCH = Patch(
    name="cpu.mamba_scan",
    symbols=(
        f"{_MIXER}.HAVE_MAMBA_SSM",
        f"{_MIXER}.mamba_split_conv1d_scan_combined",
        f"{_MIXER}.ExtendedRMSNorm",
    ),
    reason="MambaMixer refuses to be built without mamba-ssm, whose kernels need a GPU.",
    delete_when="MambaMixer has a path in PyTorch for training.",
    install=_install,
    active=without_kernels,
    versions=">=0.19",
)
