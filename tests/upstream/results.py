"""What became of each test of upstream's: kept in a CSV, counted in tables."""

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from tests.upstream.reasons import Reasons

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"


@dataclass(frozen=True)
class Result:
    """One test, or one file that could not be collected."""

    test: str
    """Its node id, from upstream's tests/unit_tests on."""
    outcome: str
    """passed, skipped (by upstream itself) or failed: on any rank."""
    error: str = ""
    """`Type: message @ file:function` of the failure, or why it was skipped."""
    seconds: float = 0.0

    @property
    def file(self) -> str:
        """The file of the test."""
        return self.test.split("::")[0]

    @property
    def folder(self) -> str:
        """The first folder of the file; "." for files that lie in none."""
        first, _, rest = self.file.partition("/")
        return first if rest else "."


class Store:
    """Results in a CSV, a file of tests at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Result]:
        """All results so far."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as lines:
            return [
                Result(row["test"], row["outcome"], row["error"], float(row["seconds"]))
                for row in csv.DictReader(lines)
            ]

    def add(self, results: Iterable[Result]) -> None:
        """Append what one file gave."""
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            if new:
                writer.writerow([field.name for field in fields(Result)])
            writer.writerows(
                astuple(replace(result, seconds=round(result.seconds, 2))) for result in results
            )


def ours(results: Iterable[Result], reasons: Reasons) -> list[Result]:
    """Failures that no reason covers."""
    return [
        result
        for result in results
        if result.outcome == FAILED and reasons.covering(result.test, result.error) is None
    ]


def _row(name: str, results: list[Result], reasons: Reasons) -> str:
    count = Counter(result.outcome for result in results)
    bad = len(ours(results, reasons))
    share = f"{100 * count[PASSED] / (count[PASSED] + bad):.1f} %" if count[PASSED] + bad else "-"
    stopped = count[FAILED] - bad
    return f"| {name} | {count[PASSED]} | {count[SKIPPED]} | {stopped} | {bad} | {share} |"


def shares(results: list[Result], reasons: Reasons) -> str:
    """A table by folder: passed, and of what nothing external stops the share that passes."""
    folders: dict[str, list[Result]] = {}
    for result in results:
        folders.setdefault(result.folder, []).append(result)
    lines = ["| folder | passed | skipped | stopped | ours | share |", "|---|---|---|---|---|---|"]
    lines += [_row(f"`{name}`", folders[name], reasons) for name in sorted(folders)]
    return "\n".join([*lines, _row("all", results, reasons)])


def stops(results: Iterable[Result], reasons: Reasons) -> str:
    """A table of what stops tests, the most frequent first."""
    count: Counter[str] = Counter()
    for result in results:
        reason = reasons.covering(result.test, result.error) if result.outcome == FAILED else None
        if reason is not None:
            count[reason] += 1
    lines = [f"| {reason} | {number} |" for reason, number in count.most_common()]
    return "\n".join(["| stopped by | tests |", "|---|---|", *lines])
