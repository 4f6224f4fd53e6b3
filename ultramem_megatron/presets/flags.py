"""Settings as words of a command line."""

from collections.abc import Mapping

from ultramem_megatron.presets import find_preset
from ultramem_megatron.presets.preset import Settings, Value


def flags(name: str, *, model: bool, training: bool) -> list[str]:
    """A preset's; its memory stands as --ultramem-preset, which own flags override.

    Raises UltraMemError for an unknown name.
    """
    preset = find_preset(name)
    words: list[str] = []
    if model:
        words += as_words(_values(preset.model))
        words += ["--ultramem-preset", name] if preset.memory else []
    if training:
        words += as_words(_values(preset.training))
    return words


def _values(settings: Settings) -> dict[str, Value]:
    return {name: value for name, (value, _) in settings.items()}


def as_words(values: Mapping[str, Value]) -> list[str]:
    """`num_layers=12, swiglu=True, bias=False` as `--num-layers 12 --swiglu`."""
    words: list[str] = []
    for name, value in values.items():
        if value is not False:
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else [str(value)]
    return words
