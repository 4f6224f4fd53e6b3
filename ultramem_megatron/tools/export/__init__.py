"""A trained model as plain safetensors and JSON, a loader that needs PyTorch only, and back."""

from ultramem_megatron.tools.export.files import load_plain, save_plain
from ultramem_megatron.tools.export.plain_model import PlainConfig, PlainGPT

__all__ = ["PlainConfig", "PlainGPT", "load_plain", "save_plain"]
