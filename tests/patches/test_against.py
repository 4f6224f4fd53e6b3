"""What another Megatron would break is read from its source."""

import shutil
from pathlib import Path

import pytest

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.patches.__main__ import main
from ultramem_megatron.patches.against import report
from ultramem_megatron.patches.registry import all_patches
from ultramem_megatron.patches.source import Parameters, Source

_TREE = {
    "pack/__init__.py": "from pack.inner import *\nfrom .inner.deep import made as known\n",
    "pack/inner/__init__.py": (
        "try:\n    from .deep import Base\nexcept ImportError:\n    Base = None\n"
    ),
    "pack/inner/deep.py": (
        "from dataclasses import dataclass\n\n\n"
        "class Base:\n    def __init__(self, size, *, kind, scale=1): ...\n"
        "    def run(self, x, **more): ...\n\n\n"
        "@dataclass\nclass Settings:\n    width: int\n    depth: int = 2\n\n\n"
        "def made(a, b=1): ...\n\n\nLIMIT, MOST = 3, 4\n"
    ),
    "pack/user.py": "import pack.inner.deep as deep\n\n\nclass Derived(deep.Base): ...\n",
}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    for name, text in _TREE.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Source(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pack.known", Parameters(("a", "b"), ("a",), False)),
        ("pack.Base.run", Parameters(("x",), ("x",), True)),
        ("pack.inner.Base", Parameters(("size", "kind", "scale"), ("size", "kind"), False)),
        ("pack.user.Derived", Parameters(("size", "kind", "scale"), ("size", "kind"), False)),
        ("pack.user.deep.made", Parameters(("a", "b"), ("a",), False)),
        ("pack.inner.deep.Settings", Parameters(("width", "depth"), ("width",), False)),
        ("pack.inner.deep.MOST", None),
    ],
)
def test_names_are_found_where_they_are_defined(source, name, expected):
    found = source.find(name)
    assert found is not None
    assert source.parameters(found) == expected


@pytest.mark.parametrize("name", ["pack.gone", "pack.Base.gone", "pack.known.more", "other"])
def test_a_name_that_is_not_there_is_not_found(source, name):
    assert source.find(name) is None


def test_a_folder_without_megatron_is_refused(tmp_path):
    with pytest.raises(UltraMemError, match="has no megatron/core"):
        report(tmp_path, all_patches())


@pytest.mark.long
def test_changes_are_named_with_the_places_that_they_break(tmp_path, capsys):
    import megatron.core

    installed = Path(megatron.core.__file__).parents[1]
    there = tmp_path / "megatron"
    shutil.copytree(
        installed, there, symlinks=True, copy_function=lambda a, b: Path(b).symlink_to(a)
    )
    assert report(tmp_path, all_patches()) == []
    _edit(there / "training/training.py", "def training_log(", "def log_of_training(")
    _edit(there / "core/utils.py", "def unwrap_model(", "def unwrap_model(must, ")
    assert main(["--against", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "training.training_log: is gone\n    patch " in printed
    assert "unwrap_model: has to be given must\n    ultramem_megatron/" in printed


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.unlink()
    file.write_text(text.replace(old, new))
