"""Names of packages by their source alone: what a dotted name stands for, and what it takes."""

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_MOST_IMPORTS = 20  # from a name to where it is defined


class Definition(NamedTuple):
    """Something with a name; node: a module, class, function, assignment or other statement."""

    module: str
    node: ast.AST


class Parameters(NamedTuple):
    """Of a function, or of the class that it makes; without self."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    """Those without a default."""
    open: bool
    """Whether any keyword is taken."""


class Source:
    """The packages in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, name: str, imports: int = _MOST_IMPORTS) -> Definition | None:
        """What a dotted name stands for there; None if there is no such name."""
        return self._follow(Definition("", ast.Module([], [])), name, imports)

    def parameters(self, found: Definition) -> Parameters | None:
        """None for what takes none: a constant, a module, a class whose making is not written."""
        node = found.node
        if isinstance(node, ast.ClassDef):
            if _is_dataclass(node):
                return _fields(node)
            made = self._member(found, "__init__", _MOST_IMPORTS)
            return None if made is None else self.parameters(made)
        return _signature(node) if isinstance(node, ast.FunctionDef) else None

    def _follow(self, start: Definition, name: str, imports: int) -> Definition | None:
        found: Definition | None = start
        for part in name.split("."):
            if found is None:
                return None
            if isinstance(found.node, ast.Module):
                found = self._of_module(found.module, part, imports)
            elif isinstance(found.node, ast.ClassDef):
                found = self._member(found, part, imports)
            else:
                return None
        return found

    def _of_module(self, module: str, part: str, imports: int) -> Definition | None:
        names, whole = self._names(module)
        bound = names.get(part)
        if isinstance(bound, ast.AST):
            return Definition(module, bound)
        inner = f"{module}.{part}".lstrip(".")
        if bound is not None and bound != inner:
            return self.find(bound, imports - 1) if imports else None
        if self._module(inner) is not None:
            return Definition(inner, ast.Module([], []))
        found = (self.find(f"{one}.{part}", imports - 1) for one in whole if imports)
        return next((each for each in found if each is not None), None)

    def _member(self, owner: Definition, part: str, imports: int) -> Definition | None:
        assert isinstance(owner.node, ast.ClassDef)
        for node in owner.node.body:
            if part in _bound_by(node):
                return Definition(owner.module, node)
        module = Definition(owner.module, ast.Module([], []))
        for base in owner.node.bases if imports else ():
            found = self._follow(module, f"{ast.unparse(base).split('[')[0]}.{part}", imports - 1)
            if found is not None:
                return found
        return None

    @functools.cache  # noqa: B019 - a source lives as long as the command
    def _module(self, name: str) -> ast.Module | None:
        path = self.folder.joinpath(*name.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text())
        return ast.Module([], []) if path.is_dir() else None

    @functools.cache  # noqa: B019 - as above
    def _names(self, module: str) -> tuple[dict[str, ast.AST | str], list[str]]:
        """What a module binds, an import as the name it is of; and modules imported whole."""
        names: dict[str, ast.AST | str] = {}
        whole: list[str] = []
        body = self._module(module) if module else None
        for node in _statements(body.body if body else ()):
            if isinstance(node, ast.ImportFrom):
                origin = self._origin(module, node)
                whole += [origin for alias in node.names if alias.name == "*"]
                for alias in node.names:
                    names.setdefault(alias.asname or alias.name, f"{origin}.{alias.name}")
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.split(".")[0]
                    names.setdefault(alias.asname or first, alias.name if alias.asname else first)
            else:
                for name in _bound_by(node):  # `except ImportError: Layer = None` comes second
                    names.setdefault(name, node)
        return names, whole

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        is_package = (self.folder.joinpath(*parts) / "__init__.py").is_file()
        kept = parts[: len(parts) - node.level + is_package]
        return ".".join([*kept, *([node.module] if node.module else [])])


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module, those in branches too: imports stand in `try`."""
    for node in body:
        yield node
        for inner in ("body", "handlers", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
                yield from _statements(getattr(node, inner, ()))


def _bound_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [
        each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)
    ]


def _signature(node: ast.FunctionDef) -> Parameters:
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    asked = [each.arg for each in plain[: len(plain) - len(given.defaults)]]
    asked += [
        each.arg
        for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
        if default is None
    ]
    every = [each.arg for each in (*plain, *given.kwonlyargs)]
    own = every[:1] if every[:1] in (["self"], ["cls"]) else []
    return Parameters(
        tuple(name for name in every if name not in own),
        tuple(name for name in asked if name not in own),
        given.kwarg is not None,
    )


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(each) for each in node.decorator_list)


def _fields(node: ast.ClassDef) -> Parameters:
    """Of a dataclass; what its bases bring is not known here, so any more may be given."""
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    names = [(ast.unparse(each.target), each.value) for each in fields]
    return Parameters(
        tuple(name for name, _ in names),
        tuple(name for name, value in names if value is None),
        False,
    )
