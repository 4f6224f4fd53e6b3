"""What a preparation says while it works: stages, MB/s and the time left."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

EVERY = 5.0  # seconds between two lines


def say(line: str) -> None:
    """A line of progress."""
    print(f"[data] {line}", flush=True)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Announce a stage, and how long it took."""
    started = time.monotonic()
    say(f"{what} ...")
    yield
    say(f"{what}: done in {time.monotonic() - started:.1f} s")


def metered[T](items: Iterable[tuple[int, T]], total: int | None = None) -> Iterator[T]:
    """Pass on the items of (bytes, item) and say every few seconds how far it is.

    total: bytes of all, where they are known; then the time left is told, too.
    """
    started = last = time.monotonic()
    done = 0
    for size, item in items:
        yield item
        done += size
        now = time.monotonic()
        if now - last > EVERY:
            last = now
            say(f"  {_how_far(done, total, now - started)}")


def _how_far(done: int, total: int | None, seconds: float) -> str:
    speed = f"{done / 1e6 / seconds:.2f} MB/s"
    if total is None:
        return f"{done / 1e6:.1f} MB, {speed}"
    left = (total - done) * seconds / max(done, 1)
    return f"{done / 1e6:.1f} of {total / 1e6:.1f} MB, {speed}, about {_time(left)} left"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
