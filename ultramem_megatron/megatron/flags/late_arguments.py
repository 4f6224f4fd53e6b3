"""Megatron's list of all arguments, printed when all is checked: a refusal is not far below it."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock


class LateArguments:
    """Lists that Megatron would print while it checks flags."""

    def __init__(self) -> None:
        self._lists: list[Callable[[], None]] = []

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within it Megatron parses flags, and prints no list."""
        from megatron.training import arguments

        original = arguments._print_args

        def keep(*given: Any) -> None:
            self._lists.append(partial(original, *given))

        with mock.patch.object(arguments, "_print_args", keep):
            yield

    def show(self) -> None:
        """Print what was held, with the values of now, on rank 0; a second call prints nothing."""
        while self._lists:
            self._lists.pop(0)()
