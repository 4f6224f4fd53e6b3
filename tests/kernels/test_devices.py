"""Kernels run on the device of their tensors, whichever is the current one.

A launch on another device reads addresses that are not there. Triton launches on the current one,
so each launch stands in `with torch.cuda.device_of(...)`, or in a function that is called there.
"""

import ast
from collections.abc import Iterator

from tests import ROOT


def _calls(tree: ast.AST, function: str = "", guarded: bool = False) -> Iterator[tuple]:
    """(what is called, the function that it is in, whether a device was chosen there)."""
    for node in ast.iter_child_nodes(tree):
        inner, safe = function, guarded
        if isinstance(node, ast.FunctionDef):
            inner, safe = node.name, False
        if isinstance(node, ast.With):
            safe = safe or "torch.cuda.device_of" in ast.unparse(node.items[0])
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), inner, safe
        yield from _calls(node, inner, safe)


def test_each_launch_is_on_the_device_of_its_tensors():
    calls = [
        call
        for file in sorted((ROOT / "kernels").rglob("*.py"))
        for call in _calls(ast.parse(file.read_text(encoding="utf-8")))
    ]
    launches = [call for call in calls if "_kernel[" in call[0]]
    assert len(launches) > 20
    where = {function for _, function, safe in launches if not safe}
    for helper in where:
        callers = {function: safe for name, function, safe in calls if name == helper}
        assert callers, f"{helper} launches a kernel without torch.cuda.device_of"
        wrong = [function for function, safe in callers.items() if not safe]
        assert not wrong, f"{wrong} call {helper} without torch.cuda.device_of"
