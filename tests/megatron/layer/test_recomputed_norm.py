"""--recompute-modules layernorm: what a memory reads is not freed, what nobody else reads is."""

import sys
from typing import Any

from tests.training_runs import run_pretrain, tiny_gpt

_FLAGS = {
    "num_layers": 4,
    "ultramem_spans": "2:3",
    "ultramem_num_keys": 11,
    "ultramem_topk": 6,
    "recompute_granularity": "selective",
    "recompute_modules": "layernorm",
    "micro_batch_size": 1,
}

_outputs: dict[Any, Any] = {}
_bytes_left: dict[int, int] = {}


def _watch():
    """In a rank: how much is left of each pre-MLP norm's output after the first forward pass."""
    import torch
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    # Megatron 0.19 takes the default, False, for fp8 and asks for Transformer Engine.
    CheckpointWithoutOutput.__init__.__defaults__ = (None,)
    torch.nn.modules.module.register_module_forward_hook(_after_forward)


def _after_forward(module, inputs, output):
    if not hasattr(module, "decoder"):
        _outputs[module] = output
        return
    for layer in module.decoder.layers:
        kept = _outputs[layer.pre_mlp_layernorm].untyped_storage().size()
        _bytes_left[layer.layer_number] = kept
    sys.exit(0)  # its backward would compile what it recomputes with


def _left(_trained):
    return _bytes_left


def test_the_norm_that_a_memory_reads_is_not_recomputed():
    run = run_pretrain(1, tiny_gpt(**_FLAGS), before=_watch, on_finish=_left)
    read = 32 * 32 * 4  # tokens, hidden, float32
    assert run.ranks[0].finished == {1: 0, 2: read, 3: 0, 4: 0}
