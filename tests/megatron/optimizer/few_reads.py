"""Runs of a table of which a step reads some rows only."""

from typing import Any

from tests.training_runs import tiny_gpt


def few_reads(**changes: Any) -> list[str]:
    """A table of 529 rows, of which a step's 16 tokens read at most 128; 16 divides its parts."""
    design = {
        "ultramem_spans": "1:2",
        "ultramem_num_keys": 24,
        "ultramem_topk": 4,
        "ultramem_value_dim": 16,
        "disable_bias_linear": True,
        "weight_decay": 0.1,
        "lr_warmup_iters": 2,
        "lr": 0.01,
        "clip_grad": 0.1,
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "seq_length": 8,
    }
    return tiny_gpt(**{**design, **changes})
