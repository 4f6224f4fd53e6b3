"""Which pipeline stages spans lie in, what cannot be carried over, and which layout would do."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.pipeline import pattern
from ultramem_megatron.memory.config import UltraMemConfig, flag
from ultramem_megatron.memory.placement import table_groups, uncut
from ultramem_megatron.memory.spans import Span


class Chunk(NamedTuple):
    """Layers first..last (1-based, empty if last < first) of a pipeline stage or virtual chunk."""

    pp_rank: int
    vp_stage: int | None
    first: int
    last: int

    def __str__(self) -> str:
        virtual = "" if self.vp_stage is None else f" chunk {self.vp_stage}"
        return f"stage {self.pp_rank}{virtual} (layers {self.first}-{self.last})"


def pipeline_chunks(config: TransformerConfig) -> list[Chunk]:
    """Every chunk of the whole pipeline, in layer order."""
    by_pattern = pattern.kept_stages(config)
    layout = config.pipeline_model_parallel_layout
    stages = range(config.pipeline_model_parallel_size)
    virtual_stages: Sequence[int | None] = (
        [None]
        if config.virtual_pipeline_model_parallel_size is None
        else range(config.virtual_pipeline_model_parallel_size)
    )
    chunks: list[Chunk] = []
    for vp_stage in virtual_stages:
        for pp_rank in stages:
            offset = chunks[-1].last if chunks else 0
            if by_pattern is not None:
                count = len(by_pattern[len(chunks)])
            elif layout is not None:
                # Megatron's own counting functions would look up the current rank here.
                count = layout.layout[pp_rank][vp_stage or 0].count(LayerType.decoder)
            else:
                offset = get_transformer_layer_offset(config, vp_stage, pp_rank)
                count = get_num_layers_to_build(config, vp_stage, pp_rank)
            chunks.append(Chunk(pp_rank, vp_stage, offset + 1, offset + count))
    return chunks


def spans_cross_stages(spans: tuple[Span, ...], config: TransformerConfig) -> bool:
    """Whether some span starts in one stage (or chunk) and ends in another."""
    return _first_crossing(spans, pipeline_chunks(config)) is not None


def _first_crossing(
    spans: tuple[Span, ...], chunks: list[Chunk]
) -> tuple[Span, Chunk, Chunk] | None:
    for span in spans:
        start = next(chunk for chunk in chunks if chunk.first <= span.start <= chunk.last)
        end = next(chunk for chunk in chunks if chunk.first <= span.end <= chunk.last)
        if start != end:
            return span, start, end
    return None


def check_pipeline(spans: tuple[Span, ...], config: TransformerConfig) -> None:
    """Raise UltraMemError if a span crosses a boundary over which its result cannot be carried.

    The result travels beside the hidden states from the last layer of a stage to the first of the
    next, so every stage must have a layer, and hidden states must have the dtype of parameters.
    """
    chunks = pipeline_chunks(config)
    crossing = _first_crossing(spans, chunks)
    if crossing is None:
        return
    reason = _obstacle(config, chunks)
    if reason is None:
        return
    span, start, end = crossing
    raise UltraMemError(
        f"--ultramem-spans: span {span} starts in pipeline {start} and ends in {end}; its result "
        f"cannot be carried over, because {reason}. " + _advice(spans, config, chunks)
    )


def check_shared_tables(ultramem: UltraMemConfig, config: TransformerConfig) -> None:
    """Raise UltraMemError if memories that share a table are on several stages or chunks."""
    chunks = pipeline_chunks(config)
    crossing = _first_crossing(table_groups(ultramem), chunks)
    if crossing is None:
        return
    group, start, end = crossing
    raise UltraMemError(
        f"{flag('share_values')} {ultramem.share_values:g}: the memories of layers {group.start} "
        f"to {group.end} share a table, but pipeline {start} and {end} would both read it. "
        + _advice(uncut(ultramem), config, chunks)
    )


def _obstacle(config: TransformerConfig, chunks: list[Chunk]) -> str | None:
    empty = [chunk for chunk in chunks if chunk.last < chunk.first]
    if empty:
        return f"pipeline stage {empty[0].pp_rank} has no transformer layer to pass it on"
    if config.fp32_residual_connection:
        return "--fp32-residual-connection gives hidden states another dtype than results"
    return None


def most_on_one_stage(layers: Iterable[int], config: TransformerConfig) -> int:
    """Number of memories, or of their tables, on the pipeline stage that holds the most.

    layers: where they are.
    """
    numbers = tuple(layers)
    held = [0] * config.pipeline_model_parallel_size
    for chunk in pipeline_chunks(config):
        held[chunk.pp_rank] += sum(chunk.first <= number <= chunk.last for number in numbers)
    return max(held)


def _advice(spans: tuple[Span, ...], config: TransformerConfig, chunks: list[Chunk]) -> str:
    layout = suggest_layout(spans, config, len(chunks))
    if layout is not None:
        return f'Use {layout_flag(config)} "{layout}", or other spans.'
    most = len(allowed_cuts(spans, config.num_layers)) + 1
    largest = most // (len(chunks) // config.pipeline_model_parallel_size)
    return (
        f"These spans allow at most {most} stages or virtual chunks, {len(chunks)} are asked for: "
        f"use --pipeline-model-parallel-size {max(largest, 1)} or less, or shorter spans."
    )


def allowed_cuts(spans: tuple[Span, ...], num_layers: int) -> list[int]:
    """Layers after which a stage may end."""
    return [
        layer
        for layer in range(1, num_layers)
        if not any(span.start <= layer < span.end for span in spans)
    ]


def layout_flag(config: TransformerConfig) -> str:
    """The flag whose value `suggest_layout` gives."""
    is_gpt = pattern.kept_stages(config) is None
    return "--pipeline-model-parallel-layout" if is_gpt else pattern.FLAG


def suggest_layout(
    spans: tuple[Span, ...], config: TransformerConfig, num_chunks: int
) -> str | None:
    """The most even layout in which no span crosses, in Megatron's notation; None if there is none.

    With spans 3:5/6:8/9:11, 12 layers and 2 chunks: "Et*5|t*7L"; heads for later tokens last. Of a
    HybridModel: its pattern, with a | at the end of each chunk.
    """
    sizes = even_sizes(spans, config.num_layers, num_chunks)
    if sizes is None:
        return None
    symbols = pattern.kept_stages(config)
    if symbols is not None:
        layers = iter("".join(symbols))
        parts = ("".join(itertools.islice(layers, size)) for size in sizes)
        return "|".join(parts) + pattern.kept_heads(config)
    heads = "m" * (getattr(config, "mtp_num_layers", None) or 0)
    return "E" + "|".join(f"t*{size}" if size > 1 else "t" for size in sizes) + heads + "L"


def even_sizes(spans: tuple[Span, ...], num_layers: int, num_chunks: int) -> tuple[int, ...] | None:
    """Layers of each chunk where they are most even and no span crosses; None: it cannot be."""
    cuts = [*allowed_cuts(spans, num_layers), num_layers]

    @functools.cache
    def best(start: int, chunks: int) -> tuple[int, tuple[int, ...]] | None:
        """Smallest possible largest chunk for layers start+1.., and its chunk sizes."""
        if chunks == 1:
            return num_layers - start, (num_layers - start,)
        found = None
        for cut in cuts:
            rest = best(cut, chunks - 1) if start < cut < num_layers else None
            if rest is None:
                continue
            candidate = (max(cut - start, rest[0]), (cut - start, *rest[1]))
            found = candidate if found is None else min(found, candidate)
        return found

    result = best(0, num_chunks)
    return None if result is None else result[1]
