"""The paper's models by name: Megatron's flags, the memory design, the training, and sources.

    ultramem presets                       # the names
    ultramem presets NAME                  # every setting and where it is from
    $(ultramem presets NAME --model --training)      # spliced into a command

`--ultramem-preset NAME` takes the memory design alone and leaves the transformer to your flags.
"""

from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.presets.ablations import ABLATIONS
from ultramem_megatron.presets.family import FAMILY
from ultramem_megatron.presets.models import MODELS
from ultramem_megatron.presets.preset import Preset

__all__ = ["MEMORY_PRESETS", "PRESETS", "find_preset", "preset_fields"]

PRESETS: dict[str, Preset] = MODELS | FAMILY | ABLATIONS
MEMORY_PRESETS = tuple(name for name, preset in PRESETS.items() if preset.memory)


def find_preset(name: str) -> Preset:
    """Raises UltraMemError for an unknown name, listing the known."""
    if name not in PRESETS:
        raise UltraMemError(f"Preset {name!r} is unknown. Known presets: {', '.join(PRESETS)}.")
    return PRESETS[name]


def preset_fields(name: str) -> dict[str, Any]:
    """UltraMemConfig fields of a preset (spans as text), for --ultramem-preset.

    Raises UltraMemError for a name that is unknown or of a model without memory.
    """
    if name not in MEMORY_PRESETS:
        kind = "has no memory layers" if name in PRESETS else "is unknown"
        raise UltraMemError(
            f"--ultramem-preset {name!r} {kind}. Known presets: {', '.join(MEMORY_PRESETS)}."
        )
    return {field: setting.value for field, setting in PRESETS[name].memory.items()}
