"""What an exported folder holds for transformers: these files, copied as they are.

They import torch and transformers and each other, nothing of this package; they are the package's
own modules too, so that an export is written and read back without running a folder's code. One
that decoding in Megatron needs as well is a link to where that finds it.
"""

SOURCES = (
    "configuration_ultramem.py",
    "hot_rows_ultramem.py",
    "layers_ultramem.py",
    "mamba_ultramem.py",
    "mapped_ultramem.py",
    "memory_ultramem.py",
    "modeling_ultramem.py",
    "quantized_ultramem.py",
    "retrieval_ultramem.py",
    "served_ultramem.py",
    "values_ultramem.py",
)
"""The files that are copied."""
