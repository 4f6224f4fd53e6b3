"""A row of the report: what was measured or compared, or why it was not."""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line. value: a number in `unit`, or words; None where there is an error."""

    what: str
    value: float | str | None = None
    unit: str = ""
    error: str = ""

    def columns(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def attempted(what: str, measure: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of `measure`; where it fails, those before and one that says how."""
    try:
        yield from measure()
    except Exception as error:  # a failure is a row, never the end
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(f"{type(error).__name__}: {error}".split())
        yield Row(what=what, error=f"{words[:400]} ({place.filename}:{place.lineno})")
