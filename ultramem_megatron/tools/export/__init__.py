"""A trained model as plain safetensors and JSON, a loader that needs PyTorch only, and back."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultramem_megatron.tools.export.files import load_plain, save_plain
    from ultramem_megatron.tools.export.plain_model import PlainConfig, PlainGPT

__all__ = ["PlainConfig", "PlainGPT", "load_plain", "save_plain"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: `ultramem export --help` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ultramem_megatron.tools.export import files, plain_model

    return getattr(files if hasattr(files, name) else plain_model, name)
