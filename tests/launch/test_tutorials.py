"""Every block of launch/tutorials.md is run as it stands, one section after the other."""

import os
import re
import subprocess

import pytest

from tests import ROOT

TUTORIALS = ROOT / "launch" / "tutorials.md"
_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_every_road_has_a_section():
    titles = re.findall(r"^## \d+\. (.*)$", TUTORIALS.read_text(), re.MULTILINE)
    assert len(titles) == 8
    for command in ("pretrain", "run", "patches.megatron_lm", "--ultramem-upcycle", "own_loop"):
        assert command in TUTORIALS.read_text()


@pytest.mark.slow
def test_the_blocks_run(tmp_path):
    blocks = _BLOCK.findall(TUTORIALS.read_text())
    assert len(blocks) == 9
    settings = blocks.pop(0)
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", settings + block],
            cwd=ROOT, env={**os.environ, "RUNS": str(tmp_path)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stdout[-5000:]}"
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert (tmp_path / "launched" / "latest_checkpointed_iteration.txt").read_text() == "10"
