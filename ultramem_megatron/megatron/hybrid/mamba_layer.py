"""A Mamba layer that a memory's result passes by, or after which it is added.

S sequence, B batch, D hidden.
"""

from typing import Any

from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ultramem_megatron.megatron.layer.transformer_layer import LayerRole


class PassingMambaLayer(MambaLayer):
    """Megatron's MambaLayer between hidden states and pending result, side by side."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaLayerSubmodules,
        *args: Any,
        role: LayerRole,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.role = role

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(S, B, D), or (S, B, 2D) where the layer unpacks, to the same, (S, B, 2D) if it packs."""
        pending, under_way = None, self.role.under_way
        if self.role.unpacks:
            hidden_states, pending = self.role.unpack(hidden_states, self.layer_number)
        branch = None if under_way is None else under_way.take()
        if branch is not None:
            branch.go_on()
        output: Tensor = super().forward(hidden_states, *args, **kwargs)
        if branch is not None and under_way is not None:
            if self.layer_number == self.role.branch_end:
                pending = branch.join()
            else:
                branch.go_on()
                under_way.put(branch)
        if pending is not None and self.role.ends_at(self.layer_number):
            output, pending = output + pending, None
        if self.role.packs:
            output = self.role.pack(output, pending)
        return output
