"""A layout of a model over ranks: what each stage holds and receives, and where stages may end."""

import dataclasses
from typing import Any

from ultramem_megatron.megatron.pipeline.layout import (
    layout_flag,
    pipeline_chunks,
    spans_cross_stages,
    suggest_layout,
)
from ultramem_megatron.memory.placement import uncut
from ultramem_megatron.tools.plan.build import Run
from ultramem_megatron.tools.plan.stage_cost import stage_cost

_STAGES_SHOWN = (2, 4, 8)


def describe_layout(run: Run) -> dict[str, Any]:
    """Sizes of groups, and the cost of each pipeline stage; bytes per rank."""
    args, spans = run.args, run.ultramem.spans if run.ultramem else ()
    costs = [stage_cost(run, stage) for stage in range(run.stages)]
    return {
        "gpus": args.world_size,
        "tensor_parallel": args.tensor_model_parallel_size,
        "pipeline_parallel": run.stages,
        "context_parallel": args.context_parallel_size,
        "data_parallel": args.data_parallel_size,
        "expert_parallel": run.tables.size if run.ultramem is None else 1,
        "table_parallel": run.tables.size if run.ultramem else 0,
        "table_partition": run.tables.partition if run.ultramem and run.tables.size > 1 else "",
        "micro_batch_size": args.micro_batch_size,
        "global_batch_size": args.global_batch_size,
        "sequence_length": args.seq_length,
        "spans_cross_stages": spans_cross_stages(spans, run.transformer),
        "layout_without_crossing": suggest_layout(
            uncut(run.ultramem) if run.ultramem else (),
            run.transformer,
            len(pipeline_chunks(run.transformer)),
        ),
        "layout_flag": layout_flag(run.transformer),
        "memory_bytes_per_rank": max(cost.memory for cost in costs),
        "received_bytes_per_step": max(sum(cost.received.values()) for cost in costs),
        "stages": [dataclasses.asdict(cost) | {"memory": cost.memory} for cost in costs],
    }


def uncrossed_layouts(run: Run) -> dict[str, str | None]:
    """For some numbers of stages, the most even layout (`layout_flag`) without crossing.

    None where the spans allow no such layout; empty for a model without memory.
    """
    if run.ultramem is None:
        return {}
    return {
        str(stages): suggest_layout(uncut(run.ultramem), run.transformer, stages)
        for stages in _STAGES_SHOWN
        if stages <= run.args.num_layers
    }
