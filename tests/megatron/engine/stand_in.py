"""Transformer Engine's own Python from its wheel (1.2 MB), with a stand-in for its C++ part.

Models are built, named and loaded with it, on a CPU; nothing computes.
"""

import enum
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_ENUMS = {
    "DType": "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1",
    "NVTE_Fused_Attn_Backend": "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8",
}
_ABSENT = ("onnx", "onnxscript", "onnxscript.values")
"""What the C++ part's package would bring, for exports to ONNX."""


class _Anything(type):
    """A class whose attributes are such classes, which is the number 0 and gives itself."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, _Anything(name, (), {}))
        return cls.__dict__[name]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls

    def __int__(cls) -> int:
        return 0


class _Module(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []
        sys.modules[name] = self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _Anything(name, (), {}))
        return self.__dict__[name]


def install(folder: Path, version: str) -> None:
    """Import it from `folder`, where the wheel is unpacked; before anything imports Megatron."""
    for name in _ABSENT:
        _Module(name)
    extension = _Module("transformer_engine_torch")
    for name, members in _ENUMS.items():
        setattr(extension, name, enum.Enum(name, members, type=int, start=0))
    package: Any = _Module("transformer_engine")
    package.__path__ = [str(folder / "transformer_engine")]
    package.__version__ = version
    sys.path.insert(0, str(folder))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # libraries are not loaded
    import transformer_engine.common as common

    common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch  # noqa: F401 - which Megatron looks for
