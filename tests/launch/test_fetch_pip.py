"""launch/fetch_pip.py: which wheel it takes from an index page, and that it checks the hash."""

import hashlib
import ssl
from pathlib import Path

import pytest

from launch import fetch_pip

PAGE = """<!DOCTYPE html><html><body>
<a href="../../files/pip-9.0.3-py2.py3-none-any.whl#sha256=aa">pip-9.0.3</a>
<a href="../../files/pip-25.9.1-py3-none-any.whl#sha256=bb" data-x>pip-25.9.1</a>
<a href="../../files/pip-25.10-py3-none-any.whl#sha256=cc">pip-25.10</a>
<a href="../../files/pip-26.0b1-py3-none-any.whl#sha256=dd">pip-26.0b1</a>
<a href="../../files/pip-25.10.tar.gz#sha256=ee">pip-25.10.tar.gz</a>
</body></html>"""


def test_newest_final_wheel_is_taken() -> None:
    address = fetch_pip.newest_wheel(PAGE, "https://index.example/simple/pip/")
    assert address == "https://index.example/files/pip-25.10-py3-none-any.whl#sha256=cc"


def test_page_without_a_wheel_is_an_error() -> None:
    with pytest.raises(LookupError, match="no pip wheel at https"):
        fetch_pip.newest_wheel("<html>Sign in</html>", "https://index.example/simple/pip/")


def test_download_is_checked_against_the_stated_hash(tmp_path: Path) -> None:
    source = tmp_path / "pip-1.0-py3-none-any.whl"
    source.write_bytes(b"a wheel")
    context = ssl.create_default_context()
    (tmp_path / "to").mkdir()
    right = f"{source.as_uri()}#sha256={hashlib.sha256(b'a wheel').hexdigest()}"
    wheel = fetch_pip.download(right, tmp_path / "to", context)
    assert (wheel.name, wheel.read_bytes()) == (source.name, b"a wheel")
    with pytest.raises(ValueError, match="what was received has another hash"):
        fetch_pip.download(f"{source.as_uri()}#sha256={'0' * 64}", tmp_path / "to", context)


def test_index_is_read_as_pip_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nindex-url = https://mirror.example/simple/\n")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    assert fetch_pip.setting("index-url") == "https://mirror.example/simple/"
    monkeypatch.setenv("PIP_INDEX_URL", "https://other.example/simple")
    assert fetch_pip.setting("index-url") == "https://other.example/simple"
