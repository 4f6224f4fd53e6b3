"""The README's tree names every folder of the project's code."""

import subprocess
from pathlib import Path

from tests import ROOT


def test_every_folder_of_code_stands_in_the_tree():
    tree = (ROOT / "README.md").read_text().split("## The tree")[1]
    tracked = subprocess.run(
        ["git", "ls-files", "ultramem_megatron", "kernels", "patches", "launch"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    folders = {Path(name).parent for name in tracked if name.endswith((".py", ".sh"))}
    assert len(folders) > 5
    missing = sorted(str(path) for path in folders if f"{path.name}/ " not in tree)
    assert not missing, f"not in README.md's tree: {missing}"
