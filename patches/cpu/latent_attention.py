"""Megatron's own attention under multi-latent attention: values as wide as they are.

Multi-latent attention gives the core attention the widths of keys and values, which differ. The
computation fits any width; only the shape of what it returns was made of the keys'.
"""

from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_INIT = "megatron.core.transformer.dot_product_attention.DotProductAttention.__init__"


def _init(original: Any) -> Any:
    def init(
        self: Any,
        config: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        original(self, config, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
            # Keys and values of all heads are made from the latent one.
            self.num_query_groups_per_partition = self.num_attention_heads_per_partition

    return init


def _install(editor: Editor) -> None:
    editor.wrap(_INIT, _init)


PATCH = Patch(
    name="cpu.latent_attention",
    symbols=(_INIT,),
    reason="MultiLatentAttention builds its core attention with k_channels and v_channels, which "
    "DotProductAttention does not take.",
    delete_when="DotProductAttention takes k_channels and v_channels.",
    install=_install,
)
