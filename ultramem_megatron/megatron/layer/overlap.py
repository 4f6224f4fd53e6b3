"""Beside which layers a memory's branch can run, and what start-up says of it."""

from megatron.core.transformer.transformer_config import TransformerConfig

from ultramem_megatron.megatron.pipeline.layout import Chunk, pipeline_chunks
from ultramem_megatron.memory.spans import Span


def branch_end(span: Span, config: TransformerConfig) -> int:
    """The last layer that the branch of a span runs beside; the span's start if there is none.

    A branch cannot outlive the pipeline stage (or virtual chunk) it started in, nor the stretch of
    layers that is recomputed as one: beyond both only tensors are handed on. There it joins early,
    and its result travels on as it does without overlap.
    """
    chunk = next(c for c in pipeline_chunks(config) if c.first <= span.start <= c.last)
    return min(span.end, _recomputed_together(span.start, chunk, config))


def _recomputed_together(layer: int, chunk: Chunk, config: TransformerConfig) -> int:
    """The last layer of the stretch that Megatron recomputes as one with `layer`."""
    if config.recompute_granularity != "full":
        return chunk.last
    index, count = layer - chunk.first, config.recompute_num_layers
    assert count is not None
    if config.recompute_method == "uniform":
        return min(chunk.first + (index // count + 1) * count - 1, chunk.last)
    # "block": the first `count` layers of a chunk, each for itself; the rest is kept.
    return layer if index < count else chunk.last


def describe_overlap(spans: tuple[Span, ...], config: TransformerConfig) -> str:
    """One line for the log: what each memory runs beside."""
    return " > UltraMem overlap: " + "; ".join(_describe(span, config) for span in spans)


def _describe(span: Span, config: TransformerConfig) -> str:
    end = branch_end(span, config)
    if span.start == span.end:
        return f"span {span} reads and adds in one layer: nothing to overlap"
    reason = "" if end == span.end else ", where its stage or recomputed stretch ends"
    if end == span.start:
        return f"span {span} overlaps nothing: it joins after layer {end}{reason}"
    layers = f"layer {end}" if end == span.start + 1 else f"layers {span.start + 1}-{end}"
    return f"span {span} beside {layers}{reason}"
