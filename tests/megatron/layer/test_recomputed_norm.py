"""--recompute-modules layernorm: what a memory reads is not freed, what nobody else reads is."""

import torch

from tests.ranks import run_on_ranks
from tests.training_runs import tiny_gpt

_FLAGS = {
    "num_layers": 4, "ultramem_spans": "2:3", "ultramem_num_keys": 11, "ultramem_topk": 6,
    "recompute_granularity": "selective", "recompute_modules": "layernorm",
}  # fmt: skip


def _bytes_left():
    """Of the output of each layer's pre-MLP norm, after a forward pass, and of memories' inputs."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    from ultramem_megatron.inference.untrained import untrained_model

    # Megatron 0.19 takes the default, False, for fp8 and asks for Transformer Engine.
    CheckpointWithoutOutput.__init__.__defaults__ = (None,)
    model, _ = untrained_model(tiny_gpt(**_FLAGS))
    outputs, inputs = {}, {}
    for layer in model.modules():
        if hasattr(layer, "pre_mlp_layernorm"):
            number = layer.layer_number
            layer.pre_mlp_layernorm.register_forward_hook(
                lambda _norm, _inputs, output, number=number: outputs.update({number: output})
            )
            if getattr(layer, "memory", None) is not None:
                layer.memory.register_forward_pre_hook(
                    lambda _memory, args, number=number: inputs.update({number: args[0]})
                )
    tokens = torch.zeros(1, 32, dtype=torch.long)
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool).triu(1)
    model.train()(tokens, torch.arange(32).unsqueeze(0), mask, labels=tokens)
    return tuple(
        {number: tensor.untyped_storage().size() for number, tensor in kept.items()}
        for kept in (outputs, inputs)
    )


def test_the_norm_that_a_memory_reads_is_not_recomputed():
    outputs, inputs = run_on_ranks(1, _bytes_left)[0]
    read = 32 * 32 * 4  # tokens, hidden, float32
    assert outputs == {1: 0, 2: read, 3: 0, 4: 0}
    assert inputs == {2: read}
