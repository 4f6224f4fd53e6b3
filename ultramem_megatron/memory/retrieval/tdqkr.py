"""Tucker-decomposed query-key retrieval with multi-core scoring (paper 3.3, 3.5; eq. 4-17)."""

import torch
from torch import Tensor, nn

from ultramem_megatron.kernels.tucker_topk import tucker_topk
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.retrieval.keys import ProductKeys
from ultramem_megatron.memory.retrieval.retrieved import Retrieved
from ultramem_megatron.memory.retrieval.tucker_core import TuckerCores


class TuckerRetrieval(nn.Module):
    """Shortlist each side by the rank-1 filter, then score the m x m candidates exactly.

    The filter's (u, t) are the buffers of `cores`; whoever trains the layer updates them after
    each optimizer step, evaluation uses the last ones.
    """

    def __init__(self, config: UltraMemConfig, eps: float) -> None:
        super().__init__()
        self.config = config
        self.keys = ProductKeys(config, eps)
        self.cores = TuckerCores(config)

    def forward(self, query: Tensor) -> Retrieved:
        """query: (T, Q, 2, Dk)."""
        directions = torch.stack([self.cores.u, self.cores.t])
        keys, scores = self.keys(query, directions, self.config.topk)
        best = tucker_topk(scores, keys, self.cores(), self.config.keys_per_side)
        return Retrieved.by_head(*best)
