"""UltraMemConfig: everything that defines a memory layer, in the paper's symbols.

D hidden size, L transformer layers, n physical keys per side, N = n*n physical values,
e = sqrt(E), Dk key dim, Dv value dim, m top-m per head, H heads, r Tucker rank, h cores.
Sources: UltraMem, arXiv 2411.12364; "official" is the authors' published code.
"""

import math
from dataclasses import dataclass
from typing import Literal

from ultramem_megatron.memory.spans import Span

RankLayout = Literal["split", "full"]
Norm = Literal["layernorm", "rmsnorm", "none"]
ShareOrder = Literal["block", "ring", "noring", "same"]
Activation = Literal[
    "none",
    "gelu",
    "relu",
    "silu",
    "tanh",
    "sigmoid",
    "elu",
    "celu",
    "selu",
    "relu6",
    "leaky_relu",
    "mish",
    "softplus",
    "softsign",
    "hardswish",
    "hardsigmoid",
]
"""Functions of torch.nn.functional, with torch's own constants."""


@dataclass(frozen=True, kw_only=True)
class UltraMemConfig:
    """One memory layer design and the spans at which it stands. Flags have the same names."""

    spans: tuple[Span, ...]
    """Where memories read and where their results join the residual stream (section 2.3)."""
    replace_mlp: bool = False
    """The layers in which memories stand have no MLP of their own (Memory+, PEER)."""
    num_keys: int
    """n: physical keys per side; a layer holds n*n values."""
    key_dim: int
    """Dk: width of a query and of a key on each side."""
    value_dim: int
    """Dv: width of one value; the paper takes D/2."""
    topk: int = 42
    """m: values read per token and head."""
    side_topk: int = 0
    """Keys of each side whose pairs are scored exactly; 0: m of them."""
    heads: int = 2
    """H: key sets, each with its own top-m, reading one table."""
    share_query: bool = True
    """Two heads use one query (section 3.2, bag of tricks 3)."""
    query_per_rank: bool = False
    """Each Tucker rank has queries of its own (UltraMemV2)."""
    retrieval: str = "tdqkr"
    """A name of memory/retrieval: how queries find values (section 3.3)."""
    tucker_rank: int = 2
    """r: components of the Tucker decomposition; 1 with pkm."""
    rank_layout: RankLayout = "split"
    """split: each rank has a slice Dk/r of the keys (paper); full: each has all Dk (official)."""
    cores: int = 2
    """h: multi-core scoring, one core and one score per slice of Dv/h (section 3.5); 1 with pkm."""
    values: str = "pooled"
    """A name of memory/values: what is read for the addresses (eq. 3)."""
    pre_value_dim: int = 0
    """Dp: width of a pre-value; 0: Dv."""
    pre_value_activation: Activation = "none"
    """Of the product of a pre-value and the input."""
    value_expansion: int = 4
    """E: virtual values per physical value, a square (implicit value expansion, section 3.4)."""
    key_expansion: int | None = None
    """e: the key grid has e*e addresses for each value; None: sqrt(E). With E=1 what the addresses
    of a value bring is added up without projections of their own (UltraMemV2)."""
    share_values: float = 1
    """g: so many memories share their values (UltraMemV2, Memory+)."""
    share_order: ShareOrder = "block"
    """block: g neighbours read one table of g*n*n values; same: one of n*n; ring, noring: all
    memories have one table, of which each reads g*n*n values, around its end or stopping there."""
    values_per_head: bool = False
    """Every head reads a table of its own (PEER)."""
    value_projection: bool = True
    """Project the pooled values (E*Dv) to D; without it Dv is D and E is 1."""
    projection_bias: bool = False
    """The projections of queries and values, and gates, have a bias (Memory+)."""
    softmax: bool = False
    """Softmax over each head's m scores (PKM); the paper removes it."""
    relu_scores: bool = False
    """ReLU of the scores (PEER, non-competing)."""
    qk_norm: Norm = "layernorm"
    """Norm of queries and keys over Dk: LayerNorm (paper), RMSNorm (official) or none."""
    query_conv_kernel: int = 0
    """Taps of the causal depthwise convolution before the query projection; 0 is none."""
    init: str = "matched"
    """A name of memory/initialization: the initial values."""
    query_centering: bool | None = None
    """Take off what queries of all tokens have in common (query_mean.py); None: with `matched`."""
    aux_loss_weight: float = 0.001
    """alpha of the auxiliary loss on the cores' small singular values (eq. 11-12); 0 is none."""
    aux_loss_margin: float = 0.15
    """tau: singular values below it are left alone."""
    value_lr_mult: float = 4.0
    """k: the table's learning rate starts at k times the base rate..."""
    value_lr_decay: float = 1.0
    """...and falls linearly to 1x over this fraction of training."""
    value_lr_fixed: float = 0.0
    """The table's learning rate itself, at every step (Memory+); 0: as the two above say."""
    value_wd_mult: float = 1.0
    """The table's weight decay is this multiple of the matrices'; 0 is none."""
    row_adam: bool = False
    """AdamW visits the rows of a table that are read, with the results of AdamW (row_adam.py)."""
    table_moments: str = "float32"
    """How it keeps moments: float32, AdamW's own, or a name of kernels.adam_rows.compact.KINDS."""
    table_main_params: str = "float32"
    """The copy that it trains of tables in bfloat16; none: it trains them, rounding at random."""
    seed: int = 1234
    """Of the initial values; they depend on it, the layer number and the sizes, nothing else."""

    def __post_init__(self) -> None:
        """`query_centering` belongs to our initialisation, not to other people's."""
        if self.query_centering is None:
            object.__setattr__(self, "query_centering", self.init == "matched")
        if self.key_expansion is None:
            object.__setattr__(self, "key_expansion", math.isqrt(max(self.value_expansion, 0)))

    @property
    def picks(self) -> int:
        """m*H: values read per token."""
        return self.topk * self.heads

    @property
    def window_keys(self) -> int:
        """w: keys a side before expansion, the root of the values that a memory can read."""
        together = 1 if self.share_order == "same" else self.share_values
        return math.isqrt(round(together * self.num_keys**2))

    @property
    def keys_per_side(self) -> int:
        """e*w: keys on each side of the grid that addresses the virtual values."""
        assert self.key_expansion is not None
        return self.key_expansion * self.window_keys

    @property
    def num_values(self) -> int:
        """N: rows of the table that a memory reads, n*n for each of those that share it."""
        memories = {"block": self.share_values, "same": 1}.get(self.share_order, len(self.spans))
        tables = self.heads if self.values_per_head else 1
        return tables * round(memories * self.num_keys**2)

    @property
    def shortlist(self) -> int:
        """Keys of each side whose pairs are scored exactly."""
        return self.side_topk or self.topk

    @property
    def pre_dim(self) -> int:
        """Dp."""
        return self.pre_value_dim or self.value_dim

    @property
    def row_widths(self) -> tuple[int, ...]:
        """Of the tables that a memory reads at each address: Dv, and Dp of pre-values."""
        return (self.value_dim, *((self.pre_dim,) if self.values == "prevalued" else ()))

    @property
    def num_queries(self) -> int:
        """Query sets: one per pair of heads when shared, else one per head."""
        return (self.heads + 1) // 2 if self.share_query else self.heads

    @property
    def rank_key_dim(self) -> int:
        """Width of one rank's slice of a key."""
        return self.key_dim // self.tucker_rank if self.rank_layout == "split" else self.key_dim


def flag(field: str) -> str:
    """The command-line flag of a config field."""
    return "--ultramem-" + field.replace("_", "-")
