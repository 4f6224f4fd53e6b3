"""Door: names in a checkpoint that belong to no single layer."""

from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

prefixes: set[str] = set()
"""Tensors whose names in a checkpoint begin so keep them, whichever layer brings them."""


def _keep_common(original: Callable[..., None]) -> Callable[..., None]:
    def replace_prefix_for_sharding(
        sharded_state_dict: dict[str, Any], old_prefix: str, new_prefix: str
    ) -> None:
        common = tuple(prefixes)
        own = {
            name: entry
            for name, entry in sharded_state_dict.items()
            if not getattr(entry, "key", "").startswith(common or "\0")
        }
        original(own, old_prefix, new_prefix)
        sharded_state_dict.update(own)

    return replace_prefix_for_sharding


_SYMBOL = "megatron.core.transformer.transformer_block.replace_prefix_for_sharding"


def _install(editor: Editor) -> None:
    editor.wrap(_SYMBOL, _keep_common, ("sharded_state_dict", "old_prefix", "new_prefix"))


PATCH = Patch(
    name="doors.common_keys",
    symbols=(_SYMBOL,),
    reason="A layer's tensors must all be named after it, and one that layers share is of none.",
    delete_when="A block leaves names alone that do not begin with a layer's.",
    install=_install,
)
