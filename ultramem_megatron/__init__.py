"""UltraMem memory layers (arXiv 2411.12364) for models trained with NVIDIA Megatron."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout `kernels/` and `patches/` stand beside this folder; there they are found as
# `ultramem_megatron.kernels` and `ultramem_megatron.patches`, as in an installed wheel.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "README.md").exists():
    __path__.append(str(_checkout))
