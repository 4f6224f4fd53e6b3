"""A folder that we fill: only files that its manifest lists are ever replaced or removed.

The manifest is JSON; its "sizes" lists every file that we put there, name -> bytes. All else is
somebody else's, links included, and stays as it is. The manifest says at every moment which files
are ours, so that a process that was killed leaves nothing that the next one may not clear away.
"""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from ultramem_megatron.errors import UltraMemError

_UNFINISHED = "unfinished"  # in a manifest: the folder in which new files are being made
_PREFIX = ".unfinished-"


class OwnFolder:
    """A folder and its manifest.

    Args:
        path: the folder; it need not exist.
        manifest: name of the manifest.
        keys: what a manifest of ours holds beside the sizes.
    """

    def __init__(self, path: Path, manifest: str, keys: Collection[str]) -> None:
        self.path = path
        self.keys = tuple(keys)
        self._manifest = path / manifest
        self._lock = path / f".{Path(manifest).stem}.lock"

    def read(self) -> dict[str, Any] | None:
        """The manifest; None where there is none because the folder is absent or empty.

        Raises:
            UltraMemError: the folder is somebody else's.
        """
        if not os.path.lexists(self.path):
            return None
        if not self.path.is_dir():
            self._refuse("is no folder")
        if not {item.name for item in self.path.iterdir()} - {self._lock.name}:
            return None
        content = self._content()
        if content is None:
            self._refuse(f"was not made by this command (no {self._manifest.name} of its making)")
        return content

    @contextmanager
    def locked(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the folder alone; `waiting` is called where another process has it."""
        self.read()
        self.path.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self._lock) and (self._lock.is_symlink() or not self._lock.is_file()):
            self._refuse(f"has something else in the place of {self._lock.name}")
        with self._lock.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(lock, fcntl.LOCK_EX)
            self._clear_unfinished()
            yield

    @contextmanager
    def building(self) -> Iterator[Path]:
        """A new folder inside for files to `publish`; gone afterwards, whatever happens."""
        before = self.read() or {**dict.fromkeys(self.keys), "sizes": {}}
        self.refuse_strangers(before["sizes"])
        new = self.path / f"{_PREFIX}{secrets.token_hex(8)}"
        self._write({**before, _UNFINISHED: new.name})
        new.mkdir()
        try:
            yield new
        finally:
            self._clear_unfinished()

    def publish(self, built: Path, content: Mapping[str, Any]) -> dict[str, int]:
        """Replace what the manifest lists by the files of `built`; `content` is the new manifest.

        Killed at any point, the folder is ours and not complete. Returns the sizes, bytes.
        """
        earlier = self.read()
        assert earlier is not None, "building() has written a manifest"
        new = sizes(built)
        self.refuse_strangers(earlier["sizes"], new)
        both = {**earlier["sizes"], **new}
        self._write({**dict.fromkeys(self.keys), "sizes": both, _UNFINISHED: built.name})
        for name in new:
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (built / name).replace(target)
        remove(self.path, earlier["sizes"].keys() - new)
        self._write({**content, "sizes": new, _UNFINISHED: built.name})
        return new

    def refuse_strangers(self, listed: Collection[str], new: Collection[str] = ()) -> None:
        """Refuse to touch what we did not make: links, and files that are there but not listed."""
        for name in sorted({*listed, *new}):
            steps = [
                self.path / step for step in (PurePosixPath(name), *PurePosixPath(name).parents)
            ]
            target, parents = steps[0], steps[1:-1]  # the last is the folder itself
            if any(step.is_symlink() for step in (target, *parents)):
                self._refuse(f"has a link in the place of {name}")
            if target.is_dir() or any(step.is_file() for step in parents):
                self._refuse(f"has something else in the place of {name}")
            if target.exists() and name not in listed:
                self._refuse(f"has a file {name} that this command did not make")

    def _content(self) -> dict[str, Any] | None:
        """The manifest if it is one of ours."""
        if self._manifest.is_symlink() or not self._manifest.is_file():
            return None
        try:
            content = json.loads(self._manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(content, dict) or not content.keys() >= {*self.keys, "sizes"}:
            return None
        listed = content["sizes"]
        if not isinstance(listed, dict) or not all(map(_is_inside, listed)):
            return None
        return content

    def _clear_unfinished(self) -> None:
        """Remove the folder that this process, or one that was killed, was building in."""
        content = self.read()
        if content is None or (name := content.pop(_UNFINISHED, None)) is None:
            return
        if isinstance(name, str) and name.startswith(_PREFIX) and "/" not in name:
            folder = self.path / name
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
        if content["sizes"]:
            self._write(content)
        else:
            self._manifest.unlink()

    def _write(self, content: Mapping[str, Any]) -> None:
        write_whole(self._manifest, json.dumps(content, indent=2) + "\n")

    def _refuse(self, why: str) -> NoReturn:
        raise UltraMemError(
            f"--output {shown(self.path)}: {why}, and nothing of others is replaced. Move it away, "
            "or give a new or an empty folder."
        )


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder`, by its name from there; sorted."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def entries(folder: Path, names: Collection[str]) -> set[str]:
    """These files of `folder`, and all in these folders of it; links count as files."""
    found = set()
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            inside = {item.name for item in path.iterdir()}
            found |= {f"{name}/{entry}" for entry in entries(path, inside)}
        elif os.path.lexists(path):
            found.add(name)
    return found


def remove(folder: Path, names: Collection[str]) -> None:
    """Remove these files of `folder`, and the folders in it that they leave empty."""
    for name in sorted(names):
        (folder / name).unlink(missing_ok=True)
        for parent in list(PurePosixPath(name).parents)[:-1]:
            if not (folder / parent).is_dir() or any((folder / parent).iterdir()):
                break
            (folder / parent).rmdir()


def write_whole(file: Path, text: str) -> None:
    """Write `file` whole or not at all; no other file is touched on the way."""
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    with partial.open("x", encoding="utf-8") as opened:
        opened.write(text)
    partial.replace(file)


def shown(path: Path) -> str:
    """A path for people: bytes that are not UTF-8 as \\xNN, so that it can be printed."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half of a pair, which JSON can say
        return False
    return (
        "\0" not in name and not path.is_absolute() and ".." not in path.parts and path.parts != ()
    )
