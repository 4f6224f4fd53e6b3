"""The ratios this project holds itself to, from the rows of one run on a CPU."""

from collections.abc import Mapping, Sequence

Row = Mapping[str, str | int | float]

_SMALL, _LARGE = 128**2, 1024**2


def print_ratios(rows: Sequence[Row]) -> None:
    """Print each ratio that the rows suffice for, with what it should be."""
    for name, value, bound in ratios(rows):
        print(f"{name}: {value:.2f} (target {bound})")


def ratios(rows: Sequence[Row]) -> list[tuple[str, float, str]]:
    """(what, value, target); only of the sweep over values."""
    found = []
    for values, target in ((_SMALL, 5), (_LARGE, 10)):
        plain, ours = (_of(rows, "layer", name, values) for name in ("plain", "native"))
        if plain and ours:
            name = f"layer forward+backward at {values} values, speed over the plain baseline's"
            found.append((name, _ms(plain) / _ms(ours), f">= {target}"))
    for values in (_SMALL, _LARGE):
        two, one = (
            _of(rows, "lookup behind pre-values", name, values) for name in ("two passes", "native")
        )
        if two and one:
            name = (
                f"lookup behind pre-values forward+backward at {values} values, one pass over two"
            )
            found.append((name, _ms(one) / _ms(two), "< 1"))
    small, large = (_of(rows, "lookup", "native", values) for values in (_SMALL, _LARGE))
    if small and large:
        name = f"lookup forward+backward, cost at {_LARGE} values over that at {_SMALL}"
        found.append((name, _ms(large) / _ms(small), "<= 4"))
        name = f"lookup backward, extra memory at {_LARGE} values less that at {_SMALL}, MB"
        if large["backward_extra_bytes"] != "" and small["backward_extra_bytes"] != "":
            extra = [float(row["backward_extra_bytes"]) / 1e6 for row in (large, small)]
            found.append((name, extra[0] - extra[1], "about 0"))
    return found


def _of(rows: Sequence[Row], op: str, candidate: str, values: int) -> Row | None:
    for row in rows:
        if (row["sweep"], row["op"], row["candidate"]) == ("values", op, candidate) and (
            row["passes"] == "forward+backward" and int(row["values"]) == values
        ):
            return row
    return None


def _ms(row: Row) -> float:
    return float(row["ms_min"])
