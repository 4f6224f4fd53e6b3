"""The walls of the house: rooms import downward only, and no imports run in a circle."""

import sys
import tomllib

from tests import ROOT
from tests.house import (
    FLOORS,
    PACKAGE,
    all_circles,
    arrows,
    circles,
    files,
    heights,
    inner,
    named,
    room,
    upward,
)

LIBRARIES = {"communication": {"torch"}, "kernels": {"torch", "triton"}, "memory": {"torch"}}
"""Rooms that stand on nothing else; above all not on Megatron."""


def _strangers() -> list[str]:
    return sorted(
        {
            f"{room(file)}: {name}"
            for file, imports in files().items()
            if room(file) in LIBRARIES
            for name in imports.others - sys.stdlib_module_names - LIBRARIES[room(file)]
        }
    )


def test_every_room_has_a_floor():
    assert sorted(name for rooms in FLOORS for name in rooms) == sorted(arrows(room))


def test_rooms_import_lower_floors_and_the_lower_ones_little_else():
    assert [*upward(), *_strangers()] == []
    assert set(arrows(room)["kernels"]) <= {"errors"}
    assert set(arrows(room)["communication"]) == set()


def test_no_circle_between_rooms_within_a_room_or_between_files():
    assert all_circles() == []


def test_circles_are_seen():
    graph = {"a": ["b"], "b": ["c"], "c": ["b"], "d": ["a", "e"], "e": []}
    assert circles(graph) == [["b", "c"]]
    assert heights({"a": ["b"], "b": [], "c": ["a", "b"]}) == {"a": 2, "b": 1, "c": 3}


def test_rooms_are_the_first_listing():
    assert inner("ultramem_megatron/memory/tables/traffic.py") == "memory/tables"
    assert inner("kernels/dispatch.py") == "kernels/dispatch"
    assert room("ultramem_megatron/tools/old_names/run.py") == "old_names"
    assert room("ultramem_megatron/errors.py") == "errors"
    assert room("patches/registry.py") == "patches"


def test_imports_are_seen_wherever_they_stand():
    source = """
import json, torch.nn
if TYPE_CHECKING:
    from .layer import Layer
def work():
    from ultramem_megatron.memory import config
    from ..errors import UltraMemError
"""
    assert sorted(named(source, "ultramem_megatron.memory.size")) == [
        "json",
        "torch.nn",
        "ultramem_megatron.errors.UltraMemError",
        "ultramem_megatron.memory.config",
        "ultramem_megatron.memory.layer.Layer",
    ]
    assert named("from . import a", "p.q", is_package=True) == ["p.q.a"]
    assert named("from .. import a", "p.q.r", is_package=True) == ["p.q.a"]


def test_the_wheel_holds_every_folder_of_code_and_no_other():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = listed["tool"]["setuptools"]["packages"]
    folders = {file.rpartition("/")[0] for file in files() if room(file) != "launch"}
    names = {folder.replace("/", ".") for folder in folders}
    expected = {name if name.startswith(PACKAGE) else f"{PACKAGE}.{name}" for name in names}
    assert sorted(packages) == sorted(expected)


def test_the_first_listing_is_short():
    beside = ("__pycache__", "README.md", "py.typed")
    entries = [path.name for path in (ROOT / PACKAGE).iterdir() if path.name not in beside]
    assert len(entries) <= 12, sorted(entries)
