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


@dataclass(frozen=True, kw_only=True)
class UltraMemConfig:
    """One memory layer design and the spans at which it stands. Flags have the same names."""

    spans: tuple[Span, ...]
    """Where memories read and where their results join the residual stream (section 2.3)."""
    num_keys: int
    """n: physical keys per side; a layer holds n*n values."""
    key_dim: int
    """Dk: width of a query and of a key on each side."""
    value_dim: int
    """Dv: width of one value; the paper takes D/2."""
    topk: int = 42
    """m: values read per token and head."""
    heads: int = 2
    """H: key sets, each with its own top-m, reading one table."""
    share_query: bool = True
    """Two heads use one query (section 3.2, bag of tricks 3)."""
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
    value_expansion: int = 4
    """E: virtual values per physical value, a square (implicit value expansion, section 3.4)."""
    value_projection: bool = True
    """Project the pooled values (E*Dv) to D; without it Dv is D and E is 1."""
    softmax: bool = False
    """Softmax over each head's m scores (PKM); the paper removes it."""
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
    value_wd_mult: float = 1.0
    """The table's weight decay is this multiple of the matrices'; 0 is none."""
    lazy_adam: bool = False
    """Adam leaves rows of the tables without gradient alone (lazy_adam.py)."""
    seed: int = 1234
    """Of the initial values; they depend on it, the layer number and the sizes, nothing else."""

    def __post_init__(self) -> None:
        """`query_centering` belongs to our initialisation, not to other people's."""
        if self.query_centering is None:
            object.__setattr__(self, "query_centering", self.init == "matched")

    @property
    def picks(self) -> int:
        """m*H: values read per token."""
        return self.topk * self.heads

    @property
    def key_expansion(self) -> int:
        """e = sqrt(E)."""
        return math.isqrt(self.value_expansion)

    @property
    def keys_per_side(self) -> int:
        """e*n: keys on each side of the grid that addresses the virtual values."""
        return self.key_expansion * self.num_keys

    @property
    def num_values(self) -> int:
        """N = n*n: rows of the physical table."""
        return self.num_keys**2

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
