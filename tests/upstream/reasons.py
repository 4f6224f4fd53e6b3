"""Why a test of upstream's cannot pass on a CPU, by the error that it ends in.

`reasons.txt` beside this file holds, under each `[reason]`, one pattern a line:

    [Transformer Engine is not installed]
    NameError: name 'te' is not defined
    ssm/ :: ImportError: Transformer Engine

A pattern is a regular expression that has to match the error from its start; before ` :: ` may
stand, as a glob, how the tests begin that it is for. Errors are one line,
`Type: message @ file:function`.
"""

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, Self

from ultramem_megatron.errors import UltraMemError

REASONS = Path(__file__).with_name("reasons.txt")
_FOR = " :: "


class _Pattern(NamedTuple):
    reason: str
    tests: str
    error: re.Pattern[str]


class Reasons:
    """The list, in its order: the first pattern that matches gives the reason."""

    def __init__(self, patterns: list[_Pattern]) -> None:
        self.patterns = patterns

    @classmethod
    def read(cls, text: str) -> Self:
        """Read the list.

        Raises:
            UltraMemError: a line before the first reason, or one that is no regular expression.
        """
        patterns, reason = [], ""
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith("[") and line.endswith("]") and _FOR not in line:
                reason = line[1:-1]
            elif line.strip() and not line.startswith("#"):
                patterns.append(_pattern(reason, line, number))
        return cls(patterns)

    def covering(self, test: str, error: str) -> str | None:
        """The reason for which `test` may end in `error`; None: there is none, it is ours."""
        for reason, tests, pattern in self.patterns:
            if fnmatchcase(test, f"{tests}*") and pattern.match(error):
                return reason
        return None


def _pattern(reason: str, line: str, number: int) -> _Pattern:
    tests, separator, error = line.partition(_FOR)
    if not separator:
        tests, error = "", line
    try:
        if reason:
            return _Pattern(reason, tests, re.compile(error))
        problem = "stands under no [reason]"
    except re.error as invalid:
        problem = f"is no regular expression: {invalid}"
    raise UltraMemError(f"reasons.txt, line {number}: {line!r} {problem}. Mend the line.")
