"""The README is a first screen, and its tree is the one that a visitor finds."""

import subprocess
from pathlib import Path

from tests import ROOT
from tests.documents import blocks
from tests.house import PACKAGE, floor

_CODE = (PACKAGE, "kernels", "patches", "launch", "tests")


def _paths_of(tree: str) -> list[str]:
    """The paths of an indented listing, two blanks a level; a line is a name, blanks and words."""
    above: list[str] = []
    paths = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth:] = [line.split()[0].rstrip("/")]
        paths.append("/".join(above))
    return paths


def test_paths_of_a_listing():
    tree = "a/   one\n  b/    two\n    c.py  three\nd/    four\n  b/    five"
    assert _paths_of(tree) == ["a", "a/b", "a/b/c.py", "d", "d/b"]


def _tree() -> list[str]:
    (block,) = (block for block in blocks("README.md") if block.text.startswith(f"{PACKAGE}/"))
    return _paths_of(block.text)


def test_folders_of_code_stand_in_the_tree_and_the_tree_is_true():
    named = _tree()
    tracked = subprocess.run(
        ["git", "ls-files", *_CODE], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    folders = {Path(name).parent for name in tracked if Path(name).suffix in (".py", ".sh")}
    first = {"/".join(path.parts[: 1 + (path.parts[0] == PACKAGE)]) for path in folders}
    assert len(first) > 10
    assert not sorted(first - set(named)), "not in README.md's tree"
    assert not [path for path in named if not (ROOT / path).exists()], "in the tree only"
    assert len(named) == len(set(named))


def test_rooms_stand_in_the_order_of_their_floors():
    rooms = [path.split("/")[1] for path in _tree() if path.startswith(f"{PACKAGE}/")]
    assert rooms == sorted(rooms, key=floor, reverse=True)


def test_it_stays_a_first_screen_and_a_map():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
