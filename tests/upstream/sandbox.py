"""Where upstream's tests run: a copy of its checkout, with Megatron from the installed package.

Nothing is written into the checkout, into the user's home or into the system's folder for
temporary files; /opt/data, which upstream's tests fetch from the network, stays as it is.
"""

import importlib
import os
import re
import shutil
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.version import Version

from tests import ROOT
from ultramem_megatron.errors import UltraMemError

_NOT_COPIED = ("tests", "megatron", ".git")


def checkout(path: str) -> Path:
    """The folder that MEGATRON_LM_PATH names.

    Raises:
        UltraMemError: it holds no unit tests, or those of another Megatron than the installed.
    """
    found = Path(path)
    if not (found / "tests/unit_tests/test_utilities.py").is_file():
        raise UltraMemError(
            f"MEGATRON_LM_PATH={path} holds no tests/unit_tests. Set it to a checkout of "
            "Megatron-LM, branch core_r0.19.0."
        )
    here = Version(version("megatron-core"))
    source = (found / "megatron/core/package_info.py").read_text(encoding="utf-8")
    there = ".".join(re.findall(r"^(?:MAJOR|MINOR) = (\d+)$", source, re.MULTILINE))
    if there != f"{here.major}.{here.minor}":
        raise UltraMemError(
            f"MEGATRON_LM_PATH={path} is Megatron {there}, megatron-core {here} is "
            f"installed. Check out branch core_r{here.major}.{here.minor}.0."
        )
    return found


def fill(sandbox: Path, source: Path) -> None:
    """Put the checkout into an empty folder, without the parts that megatron-core installs."""
    shutil.copytree(source / "tests", sandbox / "tests")
    for entry in source.iterdir():
        if entry.name not in _NOT_COPIED:
            (sandbox / entry.name).symlink_to(entry)
    (sandbox / "megatron").mkdir()
    for entry in (source / "megatron").iterdir():
        if find_spec(f"megatron.{entry.name}") is None:
            (sandbox / "megatron" / entry.name).symlink_to(entry)
    for name in ("home", "tmp"):
        (sandbox / name).mkdir()


def enter(sandbox: Path) -> None:
    """Make this process, a rank, see upstream's `tests` in place of ours."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [str(sandbox), *(place for place in sys.path if place not in ("", str(ROOT)))]
    os.chdir(sandbox)
    os.environ.update(
        HOME=str(sandbox / "home"),
        TMPDIR=str(sandbox / "tmp"),
        XDG_CACHE_HOME=str(sandbox / "home/.cache"),
        PYTHONPATH=os.pathsep.join([str(sandbox), str(ROOT)]),
    )
    _no_download()


def start_distributed() -> None:
    """As upstream's tests before those that are left would have done; after `enter`."""
    utilities: Any = importlib.import_module("tests.unit_tests.test_utilities")
    utilities.Utils.initialize_distributed()


def _no_download() -> None:
    from tests.test_utils.python_scripts import download_unit_tests_dataset as download

    def refuse(assets_dir: Path) -> bool:
        raise OSError("upstream's data sets are not fetched here")

    download.download_and_extract_asset = refuse
