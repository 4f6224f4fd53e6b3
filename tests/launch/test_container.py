"""launch/Dockerfile, as far as it can be read; .ci/run lints it, nothing builds it."""

import re
from fnmatch import fnmatch
from pathlib import Path

from tests import ROOT

_FILE = ROOT / "launch" / "Dockerfile"


def test_the_base_has_a_version_and_torch_is_held() -> None:
    text = _FILE.read_text()
    assert re.search(r"^ARG BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", text, re.MULTILINE)
    assert "print('torch==' + torch.__version__)\" >/opt/torch.txt" in text
    assert "pip install --constraint /opt/torch.txt --editable" in text


def test_what_is_installed_is_copied() -> None:
    left_out = Path(f"{_FILE}.dockerignore").read_text().split()
    for name in ("ultramem_megatron", "kernels", "patches", "launch", "pyproject.toml"):
        assert not any(fnmatch(name, pattern) for pattern in left_out)
    assert any(fnmatch(".venv", pattern) for pattern in left_out)
