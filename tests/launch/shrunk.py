"""The recipes' models at sizes that train in seconds, by flags given after their own."""

from ultramem_megatron.presets import find_preset
from ultramem_megatron.presets.flags import as_words
from ultramem_megatron.presets.preset import Value

_SIZES: dict[str, Value] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": 2,
    "eval_iters": 1,
    "log_interval": 1,
    "num_workers": 0,
}
_MEMORY: dict[str, Value] = {
    "ultramem_spans": "2:3",
    "ultramem_num_keys": 24,
    "ultramem_key_dim": 16,
    "ultramem_value_dim": 32,
    "ultramem_topk": 8,
}
_EXPERTS: dict[str, Value] = {"num_experts": 4, "moe_ffn_hidden_size": 32}


def shrunk(name: str, ranks: int) -> list[str]:
    """Flags that make the preset `name` small, and its layout fit on one or two ranks."""
    preset = find_preset(name)
    flags = dict(_SIZES)
    flags["tensor_model_parallel_size"] = ranks if name == "ultramem-1.6b-x12" else 1
    if preset.memory:
        flags.update(_MEMORY)
    if "num_experts" in preset.model:
        flags.update(_EXPERTS)
        flags["expert_model_parallel_size"] = ranks
    return as_words(flags)
