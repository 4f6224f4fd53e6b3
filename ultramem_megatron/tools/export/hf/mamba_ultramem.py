"""A Mamba-2 layer's mixer in plain PyTorch, and its state in a cache (arXiv 2405.21060).

B batch, S sequence, D hidden, h heads, p width of a head, g groups, n width of a state, C = h*p +
2*g*n channels of the convolution, l and m positions of a chunk. All but projections in float32.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from .configuration_ultramem import UltraMemGPTConfig

TAPS = 4
_CHUNK = 128  # positions that look at each other at once
_EPSILON = 1e-5


class MambaState(DynamicLayer):
    """What a Mamba layer keeps of a text, in the place of keys and values.

    keys: (B, TAPS-1, C), the last inputs of the convolution. values: (B, h, p, n), the state.
    """

    is_croppable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cumulative_length = 0  # tokens seen

    def take(self, inputs: Tensor, state: Tensor, tokens: int) -> None:
        """Replace what is kept, after so many more tokens."""
        if not self.is_initialized:
            self.lazy_initialization(inputs, state)
        self.keys, self.values = inputs, state
        self.cumulative_length += tokens

    def get_seq_length(self) -> int:
        """How many tokens were seen."""
        return self.cumulative_length

    def crop(self, *_: object) -> None:
        """Raise ValueError: what was taken into a state does not come out again."""
        raise ValueError(
            "The state of a Mamba layer cannot be taken back: no assisted generation with this "
            "model."
        )


class MambaNorm(nn.Module):
    """RMSNorm of each group of channels for itself."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, S, h*p), float32."""
        by_group = x.unflatten(-1, (self.groups, -1))
        scale = (by_group.square().mean(-1, keepdim=True) + _EPSILON).rsqrt()
        return (by_group * scale).flatten(-2) * self.weight.float()


class UltraMemMamba(nn.Module):
    """Input projection, causal convolution, selective scan, gated norm, output projection."""

    def __init__(self, config: UltraMemGPTConfig, cache_idx: int) -> None:
        super().__init__()
        self.cache_idx = cache_idx
        self.heads, self.groups = config.mamba_num_heads, config.mamba_num_groups
        self.width = self.heads * config.mamba_head_dim
        self.shared = self.groups * config.mamba_state_dim
        channels = self.width + 2 * self.shared
        self.in_proj = nn.Linear(config.hidden_size, self.width + channels + self.heads, bias=False)
        self.conv1d_weight = nn.Parameter(torch.empty(channels, 1, TAPS))
        self.conv1d_bias = nn.Parameter(torch.empty(channels))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = MambaNorm(self.width, self.groups)
        self.out_proj = nn.Linear(self.width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cache: Cache | None, real: Tensor | None) -> Tensor:
        """x: (B, S, D), normed; real: (B, S), False for padding before a text."""
        if real is not None:
            x = x * real.unsqueeze(-1)
        kept = None if cache is None else self._kept(cache)
        before, state = (None, None) if kept is None else (kept.keys, kept.values)
        parts = [self.width, self.width + 2 * self.shared, self.heads]
        gate, inputs, step = self.in_proj(x).float().split(parts, -1)
        if before is None:
            before = inputs.new_zeros(x.shape[0], TAPS - 1, inputs.shape[2])
        seen = torch.cat([before, inputs], 1)
        mixed = F.silu(self._convolved(seen))
        if real is not None:
            mixed = mixed * real.unsqueeze(-1)  # the bias made something of nothing
        y, state = self._scanned(mixed, F.softplus(step + self.dt_bias.float()), state)
        if kept is not None:
            kept.take(seen[:, 1 - TAPS :], state, x.shape[1])
        return self.out_proj(self.norm(y * F.silu(gate)).to(x.dtype))

    @torch.no_grad()
    def initialize(self, init: Any) -> None:
        """Draw initial values, as Mamba-2's authors do. init: transformers.initialization."""
        bound = TAPS**-0.5
        for parameter in (self.conv1d_weight, self.conv1d_bias):
            init.uniform_(parameter, -bound, bound)
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1, 16).log())
        step = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        init.copy_(self.dt_bias, step + (-torch.expm1(-step)).log())  # softplus of it is the step
        init.ones_(self.D)
        init.ones_(self.norm.weight)

    def _kept(self, cache: Cache) -> MambaState:
        """The state in a cache, whichever layers that was made with."""
        while len(cache.layers) <= self.cache_idx:
            cache.layers.append(DynamicLayer())
        kept = cache.layers[self.cache_idx]
        if not isinstance(kept, MambaState):
            kept = cache.layers[self.cache_idx] = MambaState()
        return kept

    def _convolved(self, seen: Tensor) -> Tensor:
        """(B, S, C) of inputs (B, TAPS-1+S, C)."""
        weight, bias = self.conv1d_weight.float(), self.conv1d_bias.float()
        return F.conv1d(seen.transpose(1, 2), weight, bias, groups=len(bias)).transpose(1, 2)

    def _scanned(
        self, mixed: Tensor, step_bsh: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, S, h*p) of what the convolution gives (B, S, C), and the state after it."""
        x, b, c = mixed.split([self.width, self.shared, self.shared], -1)
        x = x.unflatten(-1, (self.heads, -1))
        repeats = self.heads // self.groups
        b, c = (t.unflatten(-1, (self.groups, -1)).repeat_interleave(repeats, 2) for t in (b, c))
        decay = -self.A_log.float().exp()
        y, state = selective_scan(x, step_bsh, decay, b, c, state)
        return (y + x * self.D.float().unsqueeze(-1)).flatten(2), state


def selective_scan(
    x_bshp: Tensor,
    step_bsh: Tensor,
    decay_h: Tensor,
    b_bshn: Tensor,
    c_bshn: Tensor,
    state_bhpn: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y_s = c_s . state_s with state_s = exp(step_s decay) state_(s-1) + step_s b_s x_s; the last.

    Within a chunk every position looks at those before it, from chunk to chunk the state goes on.
    """
    if state_bhpn is None:
        state_bhpn = x_bshp.new_zeros(*x_bshp.shape[:1], *x_bshp.shape[2:], b_bshn.shape[-1])
    out = []
    for at in range(0, x_bshp.shape[1], _CHUNK):
        part = slice(at, at + _CHUNK)
        b, c, step = b_bshn[:, part], c_bshn[:, part], step_bsh[:, part]
        u = x_bshp[:, part] * step.unsqueeze(-1)
        log_blh = (step * decay_h).cumsum(1)
        y = torch.einsum("blmh,bmhp->blhp", _within(b, c, log_blh), u)
        out.append(y + torch.einsum("blhn,bhpn,blh->blhp", c, state_bhpn, log_blh.exp()))
        left = (log_blh[:, -1:] - log_blh).exp()
        added = torch.einsum("bmhn,bmhp,bmh->bhpn", b, u, left)
        state_bhpn = state_bhpn * log_blh[:, -1].exp()[..., None, None] + added
    return torch.cat(out, 1), state_bhpn


def _within(b_blhn: Tensor, c_blhn: Tensor, log_blh: Tensor) -> Tensor:
    """What position l takes of position m <= l of its chunk: (B, l, m, h)."""
    count = log_blh.shape[1]
    later = torch.ones(count, count, dtype=torch.bool, device=log_blh.device).triu(1)
    between = log_blh[:, :, None] - log_blh[:, None]
    decay = between.masked_fill(later[:, :, None], float("-inf")).exp()
    return torch.einsum("blhn,bmhn->blmh", c_blhn, b_blhn) * decay
