"""UltraMem memory layers (arXiv 2411.12364) for models trained with NVIDIA Megatron."""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
# In a checkout `kernels/` and `patches/` stand beside this folder; there they are found as
# `ultramem_megatron.kernels` and `ultramem_megatron.patches`, as in an installed wheel.
if (_here.parent / "kernels" / "README.md").exists():
    __path__.append(str(_here.parent))
__path__.append(str(_here / "tools" / "old_names"))
