"""What every rank would do again, done once in the server that ranks are forked from.

Only what is the same in each of them: imports, the texts of Megatron's help (it parses the sources
of its config classes for every parser it makes, 0.2 s), and mock data of the size that tests need
(the order of 100000 documents would be shuffled for each data set, 0.2 s).
"""

import functools
import importlib
import pkgutil
from argparse import ArgumentParser
from collections.abc import Iterator

from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
from megatron.training import argument_utils
from megatron.training.arguments import add_megatron_arguments

MOCK_DOCUMENTS = 2000
_ROOMS = ("communication", "kernels", "memory", "megatron", "patches", "training", "inference")
# Triton decides when it is imported whether it interprets; Megatron-Bridge need not be there.
_LATER = ("triton", "fused", "bridge")


def _modules(room: str) -> Iterator[str]:
    package = importlib.import_module(f"ultramem_megatron.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not any(word in module.name for word in _LATER) and not module.name.endswith("__main__"):
            yield module.name


def _remember_help_texts() -> None:
    factory = argument_utils.ArgumentGroupFactory
    read, reader = factory._get_field_docstrings, object.__new__(factory)
    once = functools.cache(lambda cls: read(reader, cls))
    factory._get_field_docstrings = lambda _self, cls: dict(once(cls))
    add_megatron_arguments(ArgumentParser())


for _room in _ROOMS:
    for _name in _modules(_room):
        importlib.import_module(_name)
_remember_help_texts()
MockGPTLowLevelDataset.size = MOCK_DOCUMENTS
