"""UltraMemConfig: everything that defines a memory layer, in the paper's symbols.

D hidden size, L transformer layers, n physical keys per side, N = n*n physical values,
e = sqrt(E), Dk key dim, Dv value dim, m top-m per head, H heads, r Tucker rank, h cores.
Sources: UltraMem, arXiv 2411.12364; "official" is the authors' published code.
"""

import math
from dataclasses import dataclass
from typing import Literal

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.spans import Span, check_spans

Retrieval = Literal["tdqkr", "pkm"]
RankLayout = Literal["split", "full"]
Norm = Literal["layernorm", "rmsnorm", "none"]
Init = Literal["paper", "official"]


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
    retrieval: Retrieval = "tdqkr"
    """tdqkr: Tucker-decomposed (section 3.3); pkm: additive product keys, the baseline."""
    tucker_rank: int = 2
    """r: components of the Tucker decomposition; 1 with pkm."""
    rank_layout: RankLayout = "split"
    """split: each rank has a slice Dk/r of the keys (paper); full: each has all Dk (official)."""
    cores: int = 2
    """h: multi-core scoring, one core and one score per slice of Dv/h (section 3.5); 1 with pkm."""
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
    init: Init = "paper"
    """paper: appendix A, calibrated to mean score 1; official: the authors' code."""
    aux_loss_weight: float = 0.001
    """alpha of the auxiliary loss on the cores' small singular values (eq. 11-12); 0 is none."""
    aux_loss_margin: float = 0.15
    """tau: singular values below it are left alone."""
    value_lr_mult: float = 10.0
    """k: the table's learning rate starts at k times the base rate..."""
    value_lr_decay: float = 1.0
    """...and falls linearly to 1x over this fraction of training."""
    lazy_adam: bool = False
    """Adam leaves rows of the tables without gradient alone (lazy_adam.py)."""
    seed: int = 1234
    """Of the initial values; they depend on it, the layer number and the sizes, nothing else."""

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

    def validate(self, *, hidden_size: int, num_layers: int) -> None:
        """Raise UltraMemError, naming flag, value, what is allowed and what to change."""
        self._check_ranges()
        check_spans(self.spans, num_layers)
        _check_expansion(self.value_expansion)
        _check_retrieval(self)
        _check_values(self, hidden_size)

    def _check_ranges(self) -> None:
        for field in ("num_keys", "key_dim", "value_dim", "topk", "heads", "tucker_rank", "cores"):
            _require(getattr(self, field) >= 1, field, getattr(self, field), "a whole number >= 1")
        _require(
            self.query_conv_kernel >= 0,
            "query_conv_kernel",
            self.query_conv_kernel,
            "a whole number >= 0 (0: no convolution)",
        )
        for field in ("aux_loss_weight", "aux_loss_margin"):
            value = getattr(self, field)
            _require(math.isfinite(value) and value >= 0, field, value, "a finite number >= 0")
        _require(
            math.isfinite(self.value_lr_mult) and self.value_lr_mult > 0,
            "value_lr_mult",
            self.value_lr_mult,
            "a finite number > 0 (1: the base rate)",
        )
        _require(
            0 < self.value_lr_decay <= 1,
            "value_lr_decay",
            self.value_lr_decay,
            "a fraction of training, > 0 and <= 1",
        )
        for field, allowed in CHOICES.items():
            _require(
                getattr(self, field) in allowed,
                field,
                getattr(self, field),
                "one of " + ", ".join(allowed),
            )


CHOICES: dict[str, tuple[str, ...]] = {
    "retrieval": ("tdqkr", "pkm"),
    "rank_layout": ("split", "full"),
    "qk_norm": ("layernorm", "rmsnorm", "none"),
    "init": ("paper", "official"),
}


def flag(field: str) -> str:
    """The command-line flag of a config field."""
    return "--ultramem-" + field.replace("_", "-")


def _require(holds: bool, field: str, value: object, allowed: str) -> None:
    if not holds:
        raise UltraMemError(f"{flag(field)} is {value}; it must be {allowed}.")


def _check_expansion(expansion: int) -> None:
    root = math.isqrt(max(expansion, 0))
    if expansion < 1 or root * root != expansion:
        below, above = max(root, 1) ** 2, (root + 1) ** 2
        raise UltraMemError(
            f"{flag('value_expansion')} is {expansion}; it must be a square (1, 4, 9, 16, ...), "
            f"because each side of the key grid grows by its root. Use {below} or {above}."
        )


def _check_retrieval(config: UltraMemConfig) -> None:
    if config.topk > config.keys_per_side:
        raise UltraMemError(
            f"{flag('topk')} is {config.topk}, more than the {config.keys_per_side} keys of a side "
            f"({flag('num_keys')} {config.num_keys} x sqrt of {flag('value_expansion')} "
            f"{config.value_expansion}). Lower top-k or raise the number of keys."
        )
    if config.share_query and config.heads > 1 and config.heads % 2:
        raise UltraMemError(
            f"{flag('heads')} is {config.heads}; with a query shared by two heads it must be 1 or "
            f"even. Use {config.heads + 1}, or --no-ultramem-share-query."
        )
    if config.retrieval == "pkm" and (config.tucker_rank, config.cores) != (1, 1):
        raise UltraMemError(
            f"{flag('retrieval')} pkm has no Tucker cores: {flag('tucker_rank')} is "
            f"{config.tucker_rank} and {flag('cores')} is {config.cores}; both must be 1."
        )
    if config.rank_layout == "split" and config.key_dim % config.tucker_rank:
        raise UltraMemError(
            f"{flag('key_dim')} is {config.key_dim}, not divisible by {flag('tucker_rank')} "
            f"{config.tucker_rank}. Use a multiple of {config.tucker_rank}, or "
            f"{flag('rank_layout')} full."
        )


def _check_values(config: UltraMemConfig, hidden_size: int) -> None:
    if config.value_dim % config.cores:
        raise UltraMemError(
            f"{flag('value_dim')} is {config.value_dim}, not divisible by {flag('cores')} "
            f"{config.cores}: each core scores an equal slice of a value. Use a multiple of "
            f"{config.cores}."
        )
    if not config.value_projection and config.value_expansion != 1:
        raise UltraMemError(
            f"{flag('value_expansion')} is {config.value_expansion}; without the value projection "
            f"it must be 1, because the projection is what expands the values. Drop "
            f"--no-ultramem-value-projection or use {flag('value_expansion')} 1."
        )
    if not config.value_projection and config.value_dim != hidden_size:
        raise UltraMemError(
            f"{flag('value_dim')} is {config.value_dim}; without the value projection it must be "
            f"the hidden size ({hidden_size}). Drop --no-ultramem-value-projection or use "
            f"{flag('value_dim')} {hidden_size}."
        )
    virtual = config.value_expansion * config.num_values
    if virtual >= 2**31:
        raise UltraMemError(
            f"{flag('num_keys')} {config.num_keys} with {flag('value_expansion')} "
            f"{config.value_expansion} gives {virtual} virtual values; addresses are 32-bit, so at "
            f"most {2**31 - 1} are possible in one layer. Use fewer keys, or more spans."
        )
