"""Whether the fields of a dataclass hold what their types say: of one that was read from a file."""

import math
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def wrong_fields(settings: Any) -> Iterator[tuple[str, str]]:
    """Names, and what they must be in words, of fields that hold something else.

    settings: a dataclass. Looks at numbers, text, true or false, Literal, and these or None.
    """
    for name, hint in get_type_hints(type(settings)).items():
        allowed = get_args(hint) if get_origin(hint) is UnionType else (hint,)
        known = [one for one in allowed if one in _WORDS or get_origin(one) is Literal]
        empty = NoneType in allowed and getattr(settings, name) is None
        if known and not empty and not any(_holds(getattr(settings, name), one) for one in known):
            yield name, " or ".join(map(_words, known))


def _holds(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:  # whole numbers are numbers, too
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]  # a number
    return type(value) is kind


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    return _WORDS[kind]
