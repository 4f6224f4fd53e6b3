"""The README's tree: every folder of code that a visitor opens first, by its whole path."""

import subprocess
from pathlib import Path

from tests import ROOT

_CODE = ("ultramem_megatron", "kernels", "patches", "launch")


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


def test_folders_of_code_stand_in_the_tree_and_the_tree_is_true():
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1].strip()
    named = _paths_of(tree)
    tracked = subprocess.run(
        ["git", "ls-files", *_CODE], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    folders = {Path(name).parent for name in tracked if Path(name).suffix in (".py", ".sh")}
    first = {"/".join(folder.parts[:2]) for folder in folders}
    assert len(first) > 15
    assert not sorted(first - set(named)), "not in README.md's tree"
    assert not [path for path in named if not (ROOT / path).exists()], "in the tree only"
    assert len(named) == len(set(named))
