"""`ultramem_megatron.convert`, a short name that stays: the loaders of authors' weights."""

import importlib
import sys

sys.modules[__name__] = importlib.import_module("ultramem_megatron.memory.convert")
