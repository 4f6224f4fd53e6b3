"""The end of decoding where ranks with prompts of their own share value tables."""

from typing import Any


def serve_until_all_finish(model: Any) -> None:
    """After the last forward pass of this rank: take part in the table reads of the others.

    Needed where ranks that decode different batches share tables, else does nothing.
    """
    from megatron.core import parallel_state

    from ultramem_megatron.memory.layer import memory_layers

    tables = [layer.values for layer in memory_layers(model)]
    if not tables or (
        parallel_state.get_expert_model_parallel_world_size()
        <= parallel_state.get_tensor_model_parallel_world_size()
    ):
        return
    # Whether anyone goes on shows at the first read of a forward pass; the others follow from it.
    while all(table.serve() for table in tables):
        pass
