"""Static batching of several texts with Mamba layers: a step is one token of each, not of one text.

Megatron hands positions and texts on the wrong way round, so that the tokens of all texts would go
through the states of the first, one behind the other. A single text hides it.

b texts, D hidden.
"""

from typing import Any

from torch import Tensor

from ultramem_megatron.patches.patch import Editor, Patch

_METHOD = "megatron.core.ssm.mamba_mixer.MambaMixer._decode"
_PARAMETERS = ("self", "hidden_states", "conv_state", "ssm_state", "batch_indices")


def _decode(
    self: Any,
    hidden_states: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    batch_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(1, b, D) to the same, with the states of b texts."""
    assert len(hidden_states) == 1, "one token at a time"
    assert self.cp.cp_size == 1, "no context parallelism in decoding"
    projected, _ = self.in_proj(hidden_states)
    y = self._ssm_decode(
        projected.transpose(0, 1), conv_state, ssm_state, batch_indices=batch_indices
    )
    out, bias = self.out_proj(y.transpose(0, 1))
    return out, bias


def _install(editor: Editor) -> None:
    editor.replace(_METHOD, _decode, _PARAMETERS)


PATCH = Patch(
    name="defects.mamba_static_batch",
    symbols=(_METHOD,),
    reason="_decode transposes for dynamic batching, which does not call it, and not for static.",
    delete_when="_decode hands (texts, 1, ...) to _ssm_decode.",
    install=_install,
    versions=">=0.19,<0.20",
)
