"""Parameters, FLOPs and weight bytes of a model, counted on the model itself.

Counted as the paper's tables count (with which its columns come out): matrices only, without
embeddings, norms, biases and routers; two FLOPs for each parameter that a token uses, attention
scores left out; a value read and added counts as its elements.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ultramem_megatron.megatron.pipeline.pattern import ATTENTION, kept_stages
from ultramem_megatron.memory.tables.value_table import is_value_table
from ultramem_megatron.tools.plan.build import Run, built_stage, command_line, parse

BATCHES = tuple(4**power for power in range(6))
"""Tokens of a decode step, one of each sequence: 1 to 1024."""


@dataclass(frozen=True)
class ReadSizes:
    """What decoding reads of the MLPs and what replaces them, in elements, all layers together."""

    mlp: int
    """Dense MLPs: read whole by every batch."""
    expert: int
    """One expert of every MoE layer."""
    experts: int
    experts_per_token: int
    memory_layers: int
    values: int
    """Rows of one value table."""
    value_dim: int
    picks: int
    """Rows that one token reads of one table, m*H."""


@dataclass(frozen=True)
class ModelSizes:
    """Elements of parameters; `dense` and `sparse` are counted as at the top of this file."""

    dense: int
    """Used by every token."""
    sparse: int
    """Experts and value tables."""
    activated_sparse: int
    """Elements of experts or values that one token uses."""
    embedding: int
    """Word embeddings and output layer."""
    uncounted: int
    """Norms, biases, routers."""
    head: int
    """The matrix that makes logits, also where it is the word embedding."""
    cached_per_token: int | None
    """Numbers in the KV cache, all layers; None for latent attention, not counted."""
    reads: ReadSizes

    @property
    def total(self) -> int:
        """dense + sparse."""
        return self.dense + self.sparse

    @property
    def activated(self) -> int:
        """Parameters that one token uses."""
        return self.dense + self.activated_sparse

    @property
    def flops_per_token(self) -> int:
        """Of one forward pass, multiply and add counting as two."""
        return 2 * self.activated


@functools.cache
def preset_sizes(preset: str) -> ModelSizes:
    """Sizes of a preset as it stands. Raises UltraMemError for an unknown name."""
    return model_sizes(parse(command_line(preset, ())))


def model_sizes(run: Run) -> ModelSizes:
    """Build the whole model (a run parsed without world_size) and count."""
    with built_stage(run) as chunks:
        found = [(_kind(name, p), name, p.numel()) for name, p in chunks[0].named_parameters()]
    counts = {kind: sum(n for k, _, n in found if k == kind) for kind in _KINDS}
    mlp = sum(n for kind, name, n in found if kind == "dense" and _is_mlp(name))
    reads = _read_sizes(run, mlp, counts["expert"])
    activated = reads.experts_per_token * reads.expert
    activated += reads.memory_layers * reads.picks * reads.value_dim
    return ModelSizes(
        dense=counts["dense"],
        sparse=counts["expert"] + counts["values"],
        activated_sparse=activated,
        embedding=counts["embedding"],
        uncounted=counts["uncounted"],
        head=_head({name: n for kind, name, n in found if kind == "embedding"}),
        cached_per_token=cached_per_token(run.transformer),
        reads=reads,
    )


def _head(embeddings: dict[str, int]) -> int:
    tied = embeddings["embedding.word_embeddings.weight"]
    return embeddings.get("output_layer.weight", tied)


def cached_per_token(transformer: Any) -> int | None:
    """Numbers of keys and values, all layers; None for latent attention, not counted."""
    if transformer.multi_latent_attention:
        return None
    heads, pattern = transformer.num_query_groups, kept_stages(transformer)
    layers = transformer.num_layers if pattern is None else "".join(pattern).count(ATTENTION)
    return int(2 * layers * heads * transformer.kv_channels)


_KINDS = ("values", "embedding", "expert", "uncounted", "dense")


def _kind(name: str, parameter: Any) -> str:
    if is_value_table(parameter):
        return "values"
    if name.startswith(("embedding.", "output_layer.")):
        return "embedding"
    if ".experts." in name:
        return "expert"
    if parameter.dim() < 2 or ".router." in name:
        return "uncounted"
    return "dense"


def _is_mlp(name: str) -> bool:
    return ".mlp." in name


def _read_sizes(run: Run, mlp: int, all_experts: int) -> ReadSizes:
    memory, experts = run.ultramem, run.args.num_experts or 0
    return ReadSizes(
        mlp=mlp,
        expert=all_experts // experts if experts else 0,
        experts=experts,
        experts_per_token=run.args.moe_router_topk if experts else 0,
        memory_layers=len(memory.spans) if memory else 0,
        values=memory.num_values if memory else 0,
        value_dim=sum(memory.row_widths) if memory else 0,
        picks=memory.picks if memory else 0,
    )


def weight_bytes_read(reads: ReadSizes, batch: int, number_bytes: int = 2) -> int:
    """Bytes of MLP, expert and value weights that one decode step reads (figures 1c and 7b).

    As the paper's section 4 counts: each of `batch` tokens has experts and values of its own until
    all are read; attention, keys and projections are left out. number_bytes: bf16 by default.
    """
    experts = min(batch * reads.experts_per_token, reads.experts) * reads.expert
    rows = min(batch * reads.picks, reads.values)
    values = reads.memory_layers * rows * reads.value_dim
    return number_bytes * (reads.mlp + experts + values)


def step_bytes_read(sizes: ModelSizes, batch: int, cache: int, number_bytes: int = 2) -> int | None:
    """All that one decode step must read: `weight_bytes_read`, all other weights, the KV cache.

    cache: tokens of each of `batch` sequences. None where the cache is not counted.
    """
    if sizes.cached_per_token is None:
        return None
    others = sizes.dense - sizes.reads.mlp + sizes.uncounted + sizes.head
    numbers = others + batch * cache * sizes.cached_per_token
    return weight_bytes_read(sizes.reads, batch, number_bytes) + number_bytes * numbers


def access_ratio(of: ReadSizes, to: ReadSizes, batches: Iterable[int]) -> dict[int, float]:
    """How many times the bytes of `to` the model `of` reads, by batch size."""
    return {b: weight_bytes_read(of, b) / weight_bytes_read(to, b) for b in batches}


def describe_sizes(sizes: ModelSizes, number_bytes: int, cache: int) -> dict[str, Any]:
    """The plan's entries on sizes; elements, FLOPs, and bytes by batch size.

    cache: tokens in the KV cache of each sequence.
    """
    return {
        "total_params": sizes.total,
        "dense_params": sizes.dense,
        "sparse_params": sizes.sparse,
        "activated_params": sizes.activated,
        "embedding_params": sizes.embedding,
        "uncounted_params": sizes.uncounted,
        "flops_per_token": sizes.flops_per_token,
        "number_bytes": number_bytes,
        "weight_bytes_read": {
            str(batch): weight_bytes_read(sizes.reads, batch, number_bytes) for batch in BATCHES
        },
        "cache_length": cache,
        "step_bytes_read": {
            str(batch): step_bytes_read(sizes, batch, cache, number_bytes) for batch in BATCHES
        },
    }
