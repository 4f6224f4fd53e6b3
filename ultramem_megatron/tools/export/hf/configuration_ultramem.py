"""What an UltraMem GPT is: a transformer's sizes and kinds, and the memories in it."""

import math
from typing import Any, ClassVar

from transformers import PreTrainedConfig

RETRIEVALS = ("tdqkr", "pkm")
VALUES = ("pooled", "prevalued", "gated")
LAYERS = ("*", "-", "E", "M")
FORMATS = ("int8", "fp8")
TABLE_MEMORIES = ("host", "disk")
_FIRST_VERSION: dict[str, Any] = {
    "replace_mlp": False,
    "side_topk": 0,
    "query_per_rank": False,
    "projection_bias": False,
    "relu_scores": False,
    "key_expansion": None,
    "pre_value_dim": 0,
    "pre_value_activation": "none",
    "share_values": 1,
    "share_order": "block",
    "values_per_head": False,
}
"""Settings of UltraMemV2, Memory+ and PEER, as they are in memories of the first version."""


class UltraMemGPTConfig(PreTrainedConfig):
    """Sizes and choices of an UltraMemGPTModel. Words of transformers, of `memory` the paper's.

    normalization: "LayerNorm" or "RMSNorm". position_embedding: "rope", "learned_absolute" or
    "none". qk_norm: norms of every head's query and key. layer_pattern: what each layer is, one
    symbol each: attention (*), MLP (-), experts (E) or Mamba (M, arXiv 2405.21060, with heads,
    groups of heads that share inputs, and states); None: each is attention and an MLP.
    num_experts: in place of every layer's MLP, with a pattern in its layers E; 0 for none.
    norm_topk_prob: a token's experts' weights sum to 1. router_float32: experts are chosen in
    float32.

    memory: None, or the settings of the memory layers (arXiv 2411.12364), all alike: spans
    "3:5/6:8" (read in layer 3, added after layer 5, counted from 1), num_keys n, key_dim,
    value_dim, topk, heads, share_query, retrieval, tucker_rank, rank_layout, cores, values,
    value_expansion, value_projection, softmax, qk_norm, query_conv_kernel, query_centering,
    aux_loss_weight, aux_loss_margin; others, of training in Megatron, are kept. values: "pooled",
    "prevalued" (UltraMemV2, arXiv 2508.18756; PEER, arXiv 2407.04153) or "gated" (Memory+, arXiv
    2412.09764), with side_topk, query_per_rank, projection_bias, relu_scores, key_expansion,
    pre_value_dim, pre_value_activation, share_values, share_order, values_per_head and replace_mlp
    (a layer with a memory has no MLP).

    value_quantization: None, or {"format": "int8" or "fp8", "block": values with a scale in common}
    of the value tables, all alike; such a model's tables are not trained.

    table_memory: of a model on a CPU, "host": value tables come into memory as the system reads
    their files, ahead of what is asked for; "disk": nothing but the pages with rows that are read.
    table_cache_rows: of each table on disk, so many rows that are read most are kept beside it; 0:
    none.
    """

    model_type = "ultramem"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    base_model_tp_plan: ClassVar = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    hidden_act: str = "gelu"
    normalization: str = "LayerNorm"
    norm_eps: float = 1e-5
    mlp_bias: bool = True
    attention_bias: bool = True
    attention_output_bias: bool = True
    qk_norm: bool = False
    position_embedding: str = "rope"
    rope_parameters: dict[str, Any] | None = None
    layer_pattern: str | None = None
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    mamba_num_groups: int = 0
    mamba_state_dim: int = 0
    tie_word_embeddings: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    router_float32: bool = False
    memory: dict[str, Any] | None = None
    value_quantization: dict[str, Any] | None = None
    table_memory: str = "host"
    table_cache_rows: int = 0
    use_cache: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from the rest. Raises ValueError for what is not known here."""
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.rope_parameters = self.rope_parameters or {"rope_type": "default", "rope_theta": 1e4}
        if self.memory is not None:
            self.memory = _FIRST_VERSION | self.memory
            if self.memory["key_expansion"] is None:
                self.memory["key_expansion"] = math.isqrt(self.memory["value_expansion"])
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise ValueError for what is not known here, also if it was set later."""
        memory = self.memory or {"retrieval": RETRIEVALS[0], "values": VALUES[0]}
        known = {
            "hidden_act": (self.hidden_act, ("gelu", "silu")),
            "normalization": (self.normalization, ("LayerNorm", "RMSNorm")),
            "position_embedding": (self.position_embedding, ("rope", "learned_absolute", "none")),
            "memory.retrieval": (memory["retrieval"], RETRIEVALS),
            "memory.values": (memory["values"], VALUES),
            "value_quantization.format": (
                (self.value_quantization or {"format": FORMATS[0]})["format"],
                FORMATS,
            ),
            "table_memory": (self.table_memory, TABLE_MEMORIES),
            "rope_type": ((self.rope_parameters or {}).get("rope_type", "default"), ("default",)),
        }
        for symbol in sorted(set(self.layer_pattern or "") - {*LAYERS}):
            known["layer_pattern"] = (symbol, LAYERS)
        for name, (given, allowed) in known.items():
            if given not in allowed:
                raise ValueError(f"{name} is {given!r}; this model knows {', '.join(allowed)}.")
        if self.table_cache_rows < 0 or (self.table_cache_rows and self.table_memory != "disk"):
            raise ValueError(
                f"table_cache_rows is {self.table_cache_rows}; it is a number of rows, of tables "
                f"on disk: give table_memory='disk', too, or leave it out."
            )
        if len(self.layer_pattern or "") not in (0, self.num_hidden_layers):
            raise ValueError(
                f"layer_pattern {self.layer_pattern} has not {self.num_hidden_layers} layers."
            )

    def parts(self, number: int) -> str:
        """What layer `number`, counted from 1, consists of, in the pattern's symbols."""
        if self.layer_pattern is not None:
            return self.layer_pattern[number - 1]
        return "*E" if self.num_experts else "*-"

    def cache_place(self, layer_idx: int) -> int:
        """Where a cache has a layer: those with attention come first, whose length it goes by."""
        kinds = [self.parts(number) for number in range(1, self.num_hidden_layers + 1)]
        if "*" in kinds[layer_idx]:
            return sum("*" in kind for kind in kinds[:layer_idx])
        first = sum("*" in kind for kind in kinds)
        return first + sum("M" in kind for kind in kinds[:layer_idx])

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Where memories read and where they are added: layers, counted from 1."""
        if self.memory is None:
            return ()
        spans = (span.split(":") for span in self.memory["spans"].split("/"))
        return tuple((int(start), int(end)) for start, end in spans)

    @property
    def table_places(self) -> tuple[tuple[int, int], ...]:
        """Of each memory: the number of the tables that it reads, and its first row in them."""
        if self.memory is None:
            return ()
        memories, together = range(len(self.spans)), self.memory["share_values"]
        if self.memory["share_order"] in ("block", "same"):
            return tuple((number // round(together), 0) for number in memories)
        ring = self.memory["share_order"] == "ring"
        last = len(memories) - (0 if ring else round(together))
        return tuple((0, min(number, last) * self.memory["num_keys"] ** 2) for number in memories)

    @property
    def shared_tables(self) -> int:
        """How many tables are shared by memories; 0: each has its own."""
        tables = len({table for table, _ in self.table_places})
        return tables if tables < len(self.spans) else 0

    @property
    def table_holders(self) -> dict[int, str]:
        """The module of the model that has the tables which the memory of a layer reads."""
        layers, tables = [start for start, _ in self.spans], [t for t, _ in self.table_places]
        if self.shared_tables:
            return {n: f"model.tables.{t}" for n, t in zip(layers, tables, strict=True)}
        return {n: f"model.layers.{n - 1}.memory" for n in layers}


def keys_per_side(memory: dict[str, Any]) -> int:
    """n: keys per side, expanded."""
    side: int = memory["key_expansion"] * math.isqrt(window(memory))
    return side


def window(memory: dict[str, Any]) -> int:
    """How many values one memory can read, a square."""
    together = 1 if memory["share_order"] == "same" else memory["share_values"]
    return math.isqrt(round(together * memory["num_keys"] ** 2)) ** 2


def table_rows(memory: dict[str, Any]) -> int:
    """Rows of the table that a memory reads; of those of one head, where each has its own."""
    spans = memory["spans"].count("/") + 1
    memories = {"block": memory["share_values"], "same": 1}.get(memory["share_order"], spans)
    return round(memories * memory["num_keys"] ** 2)
