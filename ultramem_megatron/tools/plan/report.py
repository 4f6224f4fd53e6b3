"""A plan as text."""

from typing import Any

from ultramem_megatron.presets import PRESETS
from ultramem_megatron.presets.preset import Source
from ultramem_megatron.presets.printed import TABLE_1, TABLE_2


def text(plan: dict[str, Any]) -> str:
    """Several paragraphs from what `make_plan` returns."""
    parts = [_title(plan), _sizes(plan), _reads(plan), _pipeline(plan)]
    parts += [_layout(layout) for layout in plan["layouts"]]
    return "\n\n".join(part for part in parts if part)


def _title(plan: dict[str, Any]) -> str:
    if plan["preset"] is None:
        return "model of the given flags"
    preset = PRESETS[plan["preset"]]
    inferred = [
        "--" + prefix + name.replace("_", "-")
        for prefix, settings in (("", preset.model), ("ultramem-", preset.memory))
        for name, setting in settings.items()
        if setting.source is Source.INFERRED
    ]
    lines = [f"{plan['preset']}: {plan['about']}"]
    if inferred:
        lines.append("  inferred from the paper's columns: " + " ".join(inferred))
    return "\n".join(lines)


def _sizes(plan: dict[str, Any]) -> str:
    counts = (
        ("total", "total_params", ""),
        ("dense", "dense_params", "used by every token"),
        ("sparse", "sparse_params", "experts or value tables"),
        ("activated", "activated_params", "used by one token"),
        ("embeddings", "embedding_params", "not counted above, nor are..."),
        ("other", "uncounted_params", "norms, biases, routers"),
    )
    lines = ["parameters"]
    for label, key, note in counts:
        lines.append(f"  {label:<12} {plan[key] / 1e6:12,.2f} M  {note}".rstrip())
    lines.append(
        f"FLOPs per token, forward: {plan['flops_per_token'] / 1e6:,.2f} M  "
        f"(2 per activated parameter; embeddings and attention scores left out)"
    )
    return "\n".join(lines + _agreement(plan))


def _agreement(plan: dict[str, Any]) -> list[str]:
    """What the paper prints for a preset that stands in table 1 or 2."""
    for rows, columns in (
        (TABLE_1, "{} B parameters, {} G FLOPs (table 1)"),
        (TABLE_2, "{} M dense, {} B sparse, {} M FLOPs (table 2)"),
    ):
        if plan["preset"] in rows:
            return ["the paper prints " + columns.format(*rows[plan["preset"]])]
    return []


def _reads(plan: dict[str, Any]) -> str:
    reads = plan["weight_bytes_read"]
    batches = "".join(f"{batch:>10}" for batch in reads)
    gigabytes = "".join(f"{count / 1e9:>10.3f}" for count in reads.values())
    shown = (
        f"MLP, expert and value weights read by a decode step, {plan['number_bytes']} bytes each\n"
        f"  {'batch':<6}{batches}\n  {'GB':<6}{gigabytes}"
    )
    everything = plan["step_bytes_read"].values()
    if None in everything:
        return shown
    gigabytes = "".join(f"{count / 1e9:>10.3f}" for count in everything)
    return (
        f"{shown}\n  {'all':<6}{gigabytes}  with other weights and a KV cache of "
        f"{plan['cache_length']} tokens"
    )


def _pipeline(plan: dict[str, Any]) -> str:
    found = plan["pipeline_layouts"]
    if not found:
        return ""
    lines = [f"{plan['layouts'][0]['layout_flag']} in which no span crosses a stage"]
    for stages, layout in found.items():
        lines.append(f"  {stages:>2} stages  {layout or 'none: these spans allow fewer stages'}")
    return "\n".join(lines)


def _layout(layout: dict[str, Any]) -> str:
    groups = [f"{layout[f'{kind}_parallel']} {kind}" for kind in ("tensor", "pipeline", "data")]
    if layout["context_parallel"] > 1:
        groups.append(f"{layout['context_parallel']} context")
    if layout["expert_parallel"] > 1:
        groups.append(f"{layout['expert_parallel']} expert")
    if layout["table_parallel"]:
        cut = f", {layout['table_partition']}-wise" if layout["table_partition"] else ""
        groups.append(f"tables over {layout['table_parallel']}{cut}")
    lines = [
        f"{layout['gpus']} GPUs: {' x '.join(groups[:3])}"
        + "".join(f"; {group}" for group in groups[3:])
        + f"; global batch {layout['global_batch_size']} x {layout['sequence_length']} tokens, "
        f"micro-batch {layout['micro_batch_size']}",
        "  GB per rank",
        f"  {'stage':<6}{'layers':<24}{'params':>9}{'grads':>9}{'Adam':>9}{'kept':>9}{'sum':>9}"
        f"   received in a step",
    ]
    lines += [_stage(stage) for stage in layout["stages"]]
    if layout["spans_cross_stages"]:
        lines.append(_advice(layout["layout_without_crossing"], layout["layout_flag"]))
    return "\n".join(lines)


def _stage(stage: dict[str, Any]) -> str:
    keys = ("parameters", "gradients", "optimizer", "activations", "memory")
    columns = "".join(f"{stage[key] / 1e9:>9.2f}" for key in keys)
    received = ", ".join(
        f"{cause} {count / 1e9:.2f}" for cause, count in stage["received"].items() if count >= 5e6
    )
    line = f"  {stage['stage']:<6}{stage['layers']:<24}{columns}   {received or 'next to nothing'}"
    return f"{line}; in host memory {stage['host'] / 1e9:.2f}" if stage["host"] else line


def _advice(layout: str | None, flag: str) -> str:
    crossing = "  spans cross stages: every boundary sends tensors twice as wide"
    if layout is None:
        return crossing
    return f'{crossing}; not so with {flag} "{layout}"'
