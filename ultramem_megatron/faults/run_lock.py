"""One run per folder: while a training runs, a file in its --save names it; another is refused.

The file's time of change is its heartbeat. Whether another host's is fresh is told from two times
that the file server gave, never from a clock of this host, and from seeing it change. A library's
lock would not do: locks of the kernel are not shared by every network file system and say nothing
of who holds them, soft ones have no heartbeat.
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.holder import Holder, as_text, from_text, this_process
from ultramem_megatron.faults.rewriting import finish_swaps

LOCK = "ultramem_run.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
"""Without a heartbeat for so long, a run that cannot be seen from here is gone."""
SETTLE_SECONDS = 1.0
"""Two that take over the same stale lock: who is not named in it after that was the first."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)
_held: list["RunLock"] = []


@contextlib.contextmanager
def only_run(save: str | None) -> Iterator[None]:
    """Hold the folder --save, which is made if need be; without a folder nothing happens.

    For rank 0; the others do nothing. Raises UltraMemError: the folder is another run's, or
    cannot be written to.
    """
    if not save or "://" in save or os.environ.get("RANK", "0") != "0":
        yield
        return
    lock = RunLock(Path(save))
    lock.take()
    _held.append(lock)
    try:
        finish_swaps(lock.folder)
        yield
    finally:
        _held.remove(lock)
        lock.release()


def require_own_folders() -> None:
    """Raise UltraMemError if another run has taken over a folder that this one holds.

    That happens to a run that was stopped or cut off for long; it must not write any more.
    """
    for lock in _held:
        lock.require()


class RunLock:
    """The file in a folder that says whose it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.me = this_process()
        self._file = folder / LOCK
        self._mine = folder / f".{LOCK}.{self.me.token}"  # to be linked; its time is "now"
        self._ended = threading.Event()

    def take(self) -> None:
        """Raises UltraMemError: another run holds the folder, or it cannot be written to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._mine.write_text(as_text(self.me))
            try:
                self._take()
            finally:
                self._mine.unlink(missing_ok=True)
        except OSError as error:
            raise UltraMemError(
                f"--save {self.folder} cannot be written to: {error.strerror or error}. Make room, "
                f"permit it, or give another --save."
            ) from None
        threading.Thread(target=self._beat, daemon=True, name="heartbeat of the run").start()

    def release(self) -> None:
        """Leave the folder to others; what another run has taken over stays its own."""
        self._ended.set()
        with contextlib.suppress(OSError):
            if self._is_mine():
                self._file.unlink()

    def require(self) -> None:
        """Raise UltraMemError if the lock is not ours any more."""
        if not self._is_mine():
            raise UltraMemError(
                f"--save {self.folder} was taken over by another run "
                f"({self._holder() or 'gone again'}) while this one gave no sign of life for "
                f"{STALE_SECONDS:.0f} s. This run ends without writing there."
            )

    def _take(self) -> None:
        while not self._create():
            holder = self._holder()
            if holder is None:  # released just now
                continue
            if self._lives(holder):
                self._refuse(holder)
            if self._holder() == holder:
                self._take_over(holder)
                return

    def _create(self) -> bool:
        """Make the file if there is none; a link is made or not, also by a file server."""
        try:
            os.link(self._mine, self._file)
        except FileExistsError:
            return self._is_mine()  # the answer to a first request was lost
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._create_alone()
        return True

    def _create_alone(self) -> bool:
        """As `_create`, on file systems without links."""
        try:
            with self._file.open("x") as file:
                file.write(as_text(self.me))
        except FileExistsError:
            return False
        return True

    def _take_over(self, stale: Holder) -> None:
        """Put ours in the place of a stale one; of two that do so, the last has it."""
        os.replace(self._mine, self._file)
        time.sleep(SETTLE_SECONDS)
        if not self._is_mine():
            self._refuse(self._holder() or stale)
        print(
            f"ultramem_megatron: --save {self.folder} was held by {stale}, which is gone.",
            flush=True,
        )

    def _lives(self, holder: Holder) -> bool:
        """Whether the holder is there: its process is, or its heartbeat goes on or is young."""
        alive = holder.is_alive()
        if alive is not None:
            return alive
        before, seen = self._changed(), 0
        while True:
            time.sleep(BEAT_SECONDS)
            os.utime(self._mine)
            seen += 1
            changed = self._changed()
            if changed is None:  # released
                return False
            if changed != before:
                return True
            # Two beats at least: after a pause of the file server all are late.
            if seen > 1 and self._mine.stat().st_mtime - changed > STALE_SECONDS:
                return False

    def _changed(self) -> float | None:
        """When the file changed, by the file server's clock; None without the file."""
        try:
            with self._file.open("rb") as file:  # opened: NFS asks the server only then
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def _holder(self) -> Holder | None:
        try:
            return from_text(self._file.read_bytes())
        except FileNotFoundError:
            return None

    def _is_mine(self) -> bool:
        holder = self._holder()
        return holder is not None and holder.token == self.me.token

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a file server that is away comes back
                if self._is_mine():
                    os.utime(self._file)

    def _refuse(self, holder: Holder) -> NoReturn:
        raise UltraMemError(
            f"--save {self.folder} is in use by another run: {holder}. Wait until it ends, stop it "
            f"(SIGTERM: it saves), or give another --save. One that is gone from another host is "
            f"found by itself, {STALE_SECONDS:.0f} s after its last sign of life; for one that "
            f"cannot be running delete {self._file}."
        )
