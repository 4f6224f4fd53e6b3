"""What would break under another megatron-core, read from its source without running it.

    ultramem patches --against PATH      # a checkout of Megatron-LM, or a folder of packages

Compared with the installed one: names that are used here and are gone there, parameters that are
gone or that have to be given there, methods that classes here override and that take others. What
only shows at run time (attributes of objects, behaviour) is for the tests.
"""

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ultramem_megatron
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.patches import patch
from ultramem_megatron.patches.patch import Patch
from ultramem_megatron.patches.source import Parameters, Source

_UPSTREAM = "megatron."


class Use(NamedTuple):
    """One place here that uses a name of Megatron's."""

    name: str
    """Dotted, from `megatron` on."""
    place: str
    """File and line."""
    exactly: bool
    """Whether the parameters must be the same: it is replaced or overridden here."""


def report(folder: Path, known: tuple[Patch, ...]) -> list[str]:
    """One line for each name that would break, with the places that use it.

    Raises UltraMemError if the folder has no megatron/core.
    """
    if not (folder / "megatron" / "core").is_dir():
        raise UltraMemError(
            f"--against {folder}: it has no megatron/core. Give the root of a checkout of "
            "Megatron-LM, or the folder that a megatron-core is installed in."
        )
    now, then = Source(_installed()), Source(folder)
    changes: dict[str, list[str]] = {}
    files = list(_own_files())
    given = {word for _, tree in files for word in _words(tree)}
    uses = [use for place, tree in files for use in _used_by(tree, place)]
    for use in [*_patched(known), *uses]:
        change = _change(use, now, then, given)
        if change:
            changes.setdefault(f"{use.name}: {change}", []).append(use.place)
    return [
        f"{change}\n    {', '.join(dict.fromkeys(places))}" for change, places in changes.items()
    ]


def _installed() -> Path:
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[2]


def _change(use: Use, now: Source, then: Source, given: set[str]) -> str | None:
    """What became of it; None if it is as it was, or is nothing that source shows."""
    before = now.find(use.name)
    if before is None or not f"{before.module}.".startswith(_UPSTREAM):
        return None  # or of another package, which Megatron imports
    after = then.find(use.name)
    if after is None:
        return "is gone"
    old, new = now.parameters(before), then.parameters(after)
    if old is None or new is None:
        return None
    if use.exactly:
        return None if old.names == new.names else f"takes {_listed(new.names)} now"
    return _missing(old, new, given)


def _missing(old: Parameters, new: Parameters, given: set[str]) -> str | None:
    gone = [name for name in old.names if name in given and name not in new.names]
    asked = [name for name in new.required if name not in old.names]
    parts = [f"takes {_listed(gone)} no longer"] if gone and not new.open else []
    parts += [f"has to be given {_listed(asked)}"] if asked else []
    return ", ".join(parts) or None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"


def _patched(known: tuple[Patch, ...]) -> Iterator[Use]:
    for one in known:
        for symbol in one.symbols:
            if symbol.startswith(_UPSTREAM):
                yield Use(symbol, f"patch {one.name}", exactly=True)


def _own_files() -> Iterator[tuple[str, ast.Module]]:
    """This package's source, file by file."""
    for module in (ultramem_megatron, patch):
        assert module.__file__ is not None
        folder = Path(module.__file__).parent
        for file in sorted(folder.rglob("*.py")):
            yield str(folder.name / file.relative_to(folder)), ast.parse(file.read_text())


def _words(tree: ast.Module) -> Iterator[str]:
    """Names that are given to functions, and of attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Attribute):
            yield node.attr


def _used_by(tree: ast.Module, file: str) -> Iterator[Use]:
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_UPSTREAM):
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield Use(f"{node.module}.{alias.name}", f"{file}:{node.lineno}", exactly=False)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = _dotted(node, bound)
            if name is not None:
                yield Use(name, f"{file}:{node.lineno}", exactly=False)
        elif isinstance(node, ast.ClassDef):
            yield from _overrides(node, bound, file)


def _dotted(node: ast.expr, bound: dict[str, str]) -> str | None:
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value, bound)
        return None if owner is None else f"{owner}.{node.attr}"
    return bound.get(node.id) if isinstance(node, ast.Name) else None


def _overrides(node: ast.ClassDef, bound: dict[str, str], file: str) -> Iterator[Use]:
    for base in node.bases:
        name = _dotted(base, bound)
        for method in node.body if name is not None else ():
            if isinstance(method, ast.FunctionDef):
                yield Use(f"{name}.{method.name}", f"{file}:{method.lineno}", exactly=True)
