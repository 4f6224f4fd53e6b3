"""Puts pip into the virtual environment that runs this, from the package index alone.

For Pythons without ensurepip (Debian and Ubuntu without python3-venv). Only the standard library
is used, because nothing else is there yet.
"""

import configparser
import hashlib
import html.parser
import os
import re
import ssl
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

DEFAULT_INDEX = "https://pypi.org/simple"


def setting(name: str) -> str | None:
    """A pip setting from the environment or pip's configuration files, as pip reads them."""
    if value := os.environ.get("PIP_" + name.upper().replace("-", "_")):
        return value
    home = Path.home()
    named = os.environ.get("PIP_CONFIG_FILE")
    files = [named] if named else [home / ".config/pip/pip.conf", home / ".pip/pip.conf"]
    parser = configparser.RawConfigParser()
    parser.read(["/etc/pip.conf", *files])
    return parser.get("global", name, fallback=None)


class _Links(html.parser.HTMLParser):
    """Collects the addresses of a page in order."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name == "href" and value]


def newest_wheel(page: str, address: str) -> str:
    """Address of the newest final pip wheel that a package index page links to.

    Raises:
        LookupError: the page has none.
    """
    links = _Links()
    links.feed(page)
    wheels: list[tuple[tuple[int, ...], str]] = []
    for link in links.addresses:
        name = urllib.parse.urlsplit(link).path.rpartition("/")[2]
        if match := re.fullmatch(r"pip-([\d.]+)-py3-none-any\.whl", name):
            version = tuple(map(int, match[1].split(".")))
            wheels.append((version, urllib.parse.urljoin(address, link)))
    if not wheels:
        raise LookupError(f"no pip wheel at {address}")
    return max(wheels)[1]


def download(address: str, folder: Path, context: ssl.SSLContext) -> Path:
    """Fetches a wheel and checks it against the hash in its address.

    Raises:
        ValueError: the hash differs.
    """
    parts = urllib.parse.urlsplit(address)
    with urllib.request.urlopen(parts._replace(fragment="").geturl(), context=context) as answer:
        content: bytes = answer.read()
    stated = re.fullmatch(r"sha256=([0-9a-f]{64})", parts.fragment)
    if stated and hashlib.sha256(content).hexdigest() != stated[1]:
        raise ValueError(f"{address}: what was received has another hash")
    wheel = folder / Path(parts.path).name
    wheel.write_bytes(content)
    return wheel


def main() -> None:
    """Fetches pip's wheel and lets it install itself (a wheel can be run as it is)."""
    index = (setting("index-url") or DEFAULT_INDEX).rstrip("/")
    context = ssl.create_default_context(cafile=setting("cert"))
    address = f"{index}/pip/"
    with urllib.request.urlopen(address, context=context) as answer:
        page = answer.read().decode()
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(newest_wheel(page, address), Path(folder), context)
        command = [sys.executable, f"{wheel}/pip", "install", "--quiet", "--no-index", str(wheel)]
        subprocess.run(command, check=True, env={**os.environ, "PIP_USER": "0"})


if __name__ == "__main__":
    main()
