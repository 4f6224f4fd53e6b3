"""What a patch is, and the one tool with which patches change things.

A patch states why it exists (`Patch`) and changes upstream only through an `Editor`, which checks
that the replaced object is the one we know and remembers how to put everything back.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ultramem_megatron.errors import UltraMemError

SUPPORTED_MEGATRON = ">=0.17,<0.20"
"""Versions of megatron-core that memory layers run with (a packaging specifier)."""

_FIRST_MEGATRON = ">=0.17"
"""No later ones are left out: under the override a patch has to fit, or to say that it does not."""

PATCH_MARK = "_ultramem_patch"
"""Attribute on every function we install: the name of the patch it came from."""

_ABSENT = object()


class PatchError(UltraMemError):
    """A patch does not fit the installed Megatron; the message says what differs."""


def always() -> bool:
    """The patch is needed on every machine."""
    return True


@dataclass(frozen=True)
class Patch:
    """One change of upstream behaviour, with the reason for it."""

    name: str
    symbols: tuple[str, ...]
    """Dotted names of what is changed, as a reader would search for them upstream."""
    reason: str
    """Why no public hook of Megatron serves."""
    delete_when: str
    """What has to happen upstream for this file to become unnecessary."""
    install: "Callable[[Editor], None]"
    """Makes the change; called once, only where `active()` holds."""
    active: Callable[[], bool] = always
    """Whether this machine and this installation need the patch."""
    versions: str = _FIRST_MEGATRON
    """megatron-core versions that have what is patched; left out with the others."""


def resolve(dotted: str) -> tuple[Any, str]:
    """Owner object and attribute name of a dotted path such as `package.module.Class.method`.

    Raises:
        PatchError: no prefix of the path is a module, or the attribute chain breaks.
    """
    parts = dotted.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:split])
        try:
            owner: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and not module_name.startswith(error.name):
                raise  # the module exists, but something it imports does not
            continue
        for part in parts[split:-1]:
            if not hasattr(owner, part):
                raise PatchError(f"{dotted}: {module_name} has no {part!r}.")
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise PatchError(f"{dotted}: no part of this path is an importable module.")


def parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters of `function`, in order."""
    return tuple(inspect.signature(function).parameters)


@dataclass
class Editor:
    """Replaces attributes for one patch and undoes exactly that."""

    patch_name: str
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def replace(self, dotted: str, new: Any, parameters: tuple[str, ...] | None = None) -> None:
        """Put `new` where `dotted` points.

        Args:
            dotted: full path of the attribute, e.g. `megatron.training.training.training_log`.
            new: the replacement.
            parameters: parameter names the original must have; None for objects without a
                signature (C functions, constants).

        Raises:
            PatchError: the attribute is missing or has other parameters than `parameters`.
        """
        owner, attribute = resolve(dotted)
        if not hasattr(owner, attribute):
            raise PatchError(f"patch {self.patch_name!r}: {dotted} does not exist.")
        original = getattr(owner, attribute)
        if parameters is not None and parameter_names(original) != parameters:
            raise PatchError(
                f"patch {self.patch_name!r}: {dotted} takes {parameter_names(original)}, but the "
                f"patch was written for {parameters}. Install a supported megatron-core "
                f"({SUPPORTED_MEGATRON}) or update the patch."
            )
        if inspect.isfunction(new):
            setattr(new, PATCH_MARK, self.patch_name)
        self._set(owner, attribute, new)

    def wrap(
        self, dotted: str, make: Callable[[Any], Any], parameters: tuple[str, ...] | None = None
    ) -> None:
        """Replace what `dotted` points at by `make(original)`; otherwise as `replace`."""
        owner, attribute = resolve(dotted)
        original = getattr(owner, attribute, None)
        new = make(original)
        if inspect.isfunction(new):
            new.__wrapped__ = original  # type: ignore[attr-defined]  # functools.wraps' own
        self.replace(dotted, new, parameters)

    def on_revert(self, undo: Callable[[], None]) -> None:
        """Register an undo step for a change made without `replace`."""
        self._undo.append(undo)

    def revert(self) -> None:
        """Undo every change, last first."""
        while self._undo:
            self._undo.pop()()

    def _set(self, owner: Any, attribute: str, new: Any) -> None:
        # An attribute inherited by a class must vanish again, not be copied into the class.
        stored = vars(owner).get(attribute, _ABSENT)
        setattr(owner, attribute, new)

        def undo() -> None:
            if stored is _ABSENT:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, stored)

        self._undo.append(undo)
