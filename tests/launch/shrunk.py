"""The recipes' models at sizes that train in seconds, by flags given after their own."""

from launch.recipe import Flags
from ultramem_megatron.presets import find_preset
from ultramem_megatron.presets.flags import as_words

_SIZES: Flags = {
    "num-layers": 4, "hidden-size": 64, "ffn-hidden-size": 128, "num-attention-heads": 4,
    "seq-length": 64, "max-position-embeddings": 64, "micro-batch-size": 2,
    "global-batch-size": 8, "train-iters": 2, "eval-iters": 1, "log-interval": 1, "num-workers": 0,
}  # fmt: skip
_MEMORY: Flags = {
    "ultramem-spans": "2:3", "ultramem-num-keys": 24, "ultramem-key-dim": 16,
    "ultramem-value-dim": 32, "ultramem-topk": 8,
}  # fmt: skip
_EXPERTS: Flags = {"num-experts": 4, "moe-ffn-hidden-size": 32}


def shrunk(name: str, ranks: int) -> list[str]:
    """Flags that make the preset `name` small, and its layout fit on one or two ranks."""
    preset = find_preset(name)
    flags = dict(_SIZES)
    flags["tensor-model-parallel-size"] = ranks if name == "ultramem-1.6b-x12" else 1
    if preset.memory:
        flags.update(_MEMORY)
    if "num_experts" in preset.model:
        flags.update(_EXPERTS)
        flags["expert-model-parallel-size"] = ranks
    return as_words(flags)
