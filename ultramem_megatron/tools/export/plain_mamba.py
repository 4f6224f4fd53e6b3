"""A Mamba-2 layer's mixer in plain PyTorch, as MambaMixer computes it (arXiv 2405.21060).

B batch, S sequence, D hidden, h heads, p width of a head, g groups, n width of a state; C = h*p +
2*g*n channels of the convolution.
"""

import torch
from torch import Tensor, nn

from ultramem_megatron.memory.modules import Linear
from ultramem_megatron.patches.cpu.mamba_scan import GroupedRMSNorm, split_conv1d_scan

_TAPS, _CHUNK, _EPSILON = 4, 128, 1e-5  # of MambaMixer, which no flag sets


class PlainMamba(nn.Module):
    """Input projection, causal convolution, selective scan, gated norm, output projection."""

    def __init__(
        self, hidden_size: int, *, heads: int, head_dim: int, groups: int, state_dim: int
    ) -> None:
        super().__init__()
        self.head_dim, self.groups = head_dim, groups
        width, channels = heads * head_dim, heads * head_dim + 2 * groups * state_dim
        self.in_proj = Linear(hidden_size, width + channels + heads, bias=False)
        self.conv1d_weight = nn.Parameter(torch.empty(channels, 1, _TAPS))
        self.conv1d_bias = nn.Parameter(torch.empty(channels))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = GroupedRMSNorm(width, eps=_EPSILON, group_size=width // groups)
        self.out_proj = Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, S, D), normed."""
        y = split_conv1d_scan(
            self.in_proj(x),
            self.conv1d_weight[:, 0],
            self.conv1d_bias,
            self.dt_bias.float(),
            -self.A_log.float().exp(),
            D=self.D,
            chunk_size=_CHUNK,
            headdim=self.head_dim,
            ngroups=self.groups,
        )
        return self.out_proj(self.norm(y))
