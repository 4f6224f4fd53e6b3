"""A list of kinds: what each is called and is, without importing the file that it is in.

So the flags, their help and their checks need no torch; a kind is imported when it is first used.
"""

import pkgutil
from collections.abc import Iterable, Iterator, MutableMapping
from typing import NamedTuple


class Listed(NamedTuple):
    """One place in the list."""

    where: str
    """`package.module:NAME` of the kind."""
    about: str
    """A line of help."""


class Kinds[Kind](MutableMapping[str, Kind]):
    """Kinds by name, in the order of the list."""

    def __init__(self, **listed: Listed) -> None:
        """listed: by the word that chooses it, a flag's value."""
        self._listed = listed
        self._used: dict[str, Kind | None] = dict.fromkeys(listed)

    def __getitem__(self, name: str) -> Kind:
        kind = self._used[name]
        if kind is None:
            kind = self._used[name] = pkgutil.resolve_name(self._listed[name].where)
        return kind

    def __setitem__(self, name: str, kind: Kind) -> None:
        self._used[name] = kind

    def __delitem__(self, name: str) -> None:
        del self._used[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._used)

    def __len__(self) -> int:
        return len(self._used)

    def __contains__(self, name: object) -> bool:
        return name in self._used  # Mapping's own would import it

    def described(self, names: Iterable[str] | None = None) -> str:
        """ "name: about" of those `names`, by default of all in the list."""
        chosen = self._listed if names is None else names
        return "; ".join(f"{name}: {self._listed[name].about}" for name in chosen)
