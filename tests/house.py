"""The house as its own imports draw it: rooms, floors and the arrows between them.

python -m tests.house      prints the picture

A room is a folder of the first listing of `ultramem_megatron/`, or `kernels/`, `patches/`,
`launch/`. Read with `ast`, so imports inside functions and under TYPE_CHECKING count too; names
that are looked up from strings (the commands of `__main__.py`, the modules of
`patches/registry.py`) do not.
"""

import ast
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests import ROOT

PACKAGE = "ultramem_megatron"
FLOORS = (
    ("errors", "__init__"),
    ("communication",),
    ("kernels", "presets", "data", "faults"),
    ("memory", "patches"),
    ("megatron",),
    ("training", "inference"),
    ("tools", "__main__"),
    ("launch", "old_names"),
)
"""From the ground up: a room imports only rooms of lower floors."""

Graph = Mapping[str, Iterable[str]]


class File(NamedTuple):
    """What one file imports."""

    ours: frozenset[str]
    """Files of the house, as paths from the root of the checkout."""
    others: frozenset[str]
    """First words of all other imports: `torch`, `megatron`, `json`."""


@cache
def _modules() -> dict[str, Path]:
    """Dotted name -> file; `kernels/` and `patches/` lie in the package, as pyproject.toml says."""
    found = {}
    for folder in (PACKAGE, "kernels", "patches", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if folder in ("kernels", "patches"):
                parts = (PACKAGE, *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def file_of(module: str) -> str | None:
    """The file of a dotted name, as a path from the root; None: it is no module of ours."""
    path = _modules().get(module)
    return None if path is None else str(path.relative_to(ROOT))


def named(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the imports of `source` name; `from a import b` gives a.b, be b a module or not."""
    nodes = ast.walk(ast.parse(source))
    return [name for node in nodes for name in _names(node, module, is_package)]


def _names(node: ast.AST, module: str, is_package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        above = parts[: len(parts) - node.level + is_package]
        base = ".".join([*above, *([base] if base else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


@cache
def files() -> dict[str, File]:
    """Every file of the house by its path from the root, with its imports."""
    modules, result = _modules(), {}
    for module, path in modules.items():
        ours, others = set(), set()
        source = path.read_text(encoding="utf-8")
        for name in named(source, module, path.name == "__init__.py"):
            target = modules.get(name) or modules.get(name.rpartition(".")[0])
            if target is not None:
                ours.add(str(target.relative_to(ROOT)))
            else:
                others.add(name.split(".")[0])
        here = str(path.relative_to(ROOT))
        result[here] = File(frozenset(ours - {here}), frozenset(others))
    return result


def room(file: str) -> str:
    """The room of a file; the stand-ins for old names are a room of their own, under the roof."""
    first, *rest = Path(file).with_suffix("").parts
    if rest[:2] == ["tools", "old_names"]:
        return "old_names"
    if first == PACKAGE:
        return rest[0]
    return first


def inner(file: str) -> str:
    """One level deeper: `memory/tables`, `memory/layer`."""
    parts = Path(file).with_suffix("").parts
    below = parts[2:] if parts[0] == PACKAGE else parts[1:]
    return "/".join([room(file), *below[:1]])


def arrows(place: Callable[[str], str], within: str | None = None) -> dict[str, dict[str, int]]:
    """place -> places that it imports, with the number of import arrows between their files.

    within: files of this room only.
    """
    found: dict[str, dict[str, int]] = {}
    for file, imports in files().items():
        if within not in (None, room(file)):
            continue
        here = found.setdefault(place(file), {})
        for target in imports.ours:
            there = place(target)
            if there != place(file) and within in (None, room(target)):
                here[there] = here.get(there, 0) + 1
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Sets of nodes of which each leads to each other, by names."""
    reached = {node: _reach(graph, node) for node in graph}
    rings = {
        tuple(sorted(other for other in reached[node] if node in reached[other]))
        for node in graph
        if node in reached[node]
    }
    return [list(ring) for ring in sorted(rings)]


def _reach(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead.extend(graph[node])
    return seen


def floor(name: str) -> int:
    """The floor of a room, from 1."""
    return next(number for number, rooms in enumerate(FLOORS, 1) if name in rooms)


def upward() -> list[str]:
    """Arrows between rooms that do not lead down, as `importer -> imported`."""
    return sorted(
        f"{here} -> {there}"
        for here, targets in arrows(room).items()
        for there in targets
        if floor(there) >= floor(here)
    )


def all_circles() -> list[str]:
    """Circles between the folders and files within each room, and file by file.

    Between rooms there is none when all arrows lead down.
    """
    graphs: list[Graph] = [arrows(inner, name) for name in arrows(room)]
    graphs.append({file: imports.ours for file, imports in files().items()})
    return [" ".join(ring) for graph in graphs for ring in circles(graph)]


def heights(graph: Graph) -> dict[str, int]:
    """Length of the longest chain of imports that ends in a node, from 1; no circle may be left."""
    found: dict[str, int] = {}

    def height(node: str) -> int:
        if node not in found:
            found[node] = 1 + max(map(height, graph[node]), default=0)
        return found[node]

    for node in graph:
        height(node)
    return found


def _row(here: str, targets: Mapping[str, int], width: int) -> str:
    lines = ", ".join(f"{there} {count}" for there, count in sorted(targets.items()))
    return f"  {here:<{width}} -> {lines}" if lines else f"  {here}"


def picture() -> str:
    """Rooms from the roof down, each with the rooms that it imports and how often."""
    found = arrows(room)
    width = max(map(len, found))
    lines = [
        f"{len(found)} rooms, {len(FLOORS)} floors, {sum(map(len, found.values()))} arrows, "
        f"{len(upward())} of them not downward"
    ]
    for number, rooms in reversed(list(enumerate(FLOORS, 1))):
        lines += [f"floor {number}", *(_row(name, found[name], width) for name in sorted(rooms))]
    lines += [f"not downward: {arrow}" for arrow in upward()]
    lines += [f"circle: {ring}" for ring in all_circles()]
    if not all_circles():
        for name in sorted(found):
            deep = heights(arrows(inner, name))
            lines.append(
                f"within {name}: {len(deep)} folders and files, {max(deep.values())} floors"
            )
        by_file = heights({file: imports.ours for file, imports in files().items()})
        lines.append(f"file by file: {len(by_file)} files, {max(by_file.values())} floors")
    return "\n".join(lines)


if __name__ == "__main__":
    print(picture())
