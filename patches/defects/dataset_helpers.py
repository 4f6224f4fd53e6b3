"""The C++ helpers of the datasets come compiled with the wheel and need no `make`.

This is the shortest patch: read it before writing another.
"""

import importlib.util

from ultramem_megatron.patches.patch import Editor, Patch


def _helpers_are_built() -> bool:
    return importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None


def _nothing_to_compile() -> None: ...


def _install(editor: Editor) -> None:
    editor.replace(
        "megatron.core.datasets.utils.compile_helpers", _nothing_to_compile, parameters=()
    )


PATCH = Patch(
    name="defects.dataset_helpers",
    symbols=("megatron.core.datasets.utils.compile_helpers",),
    reason="It runs `make` in site-packages and exits the process, as the wheel has no Makefile.",
    delete_when="compile_helpers() returns early if megatron.core.datasets.helpers_cpp imports.",
    install=_install,
    active=_helpers_are_built,
)
