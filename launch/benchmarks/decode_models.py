"""The models that a decode benchmark compares, at three scales.

Each trio has equal FLOPs per token; MoE and UltraMem have equal parameters too (the paper's
figures 1 and 7). For figure 6c their sparse parameters shrink: fewer experts, fewer values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from launch.small_models import plain_gpt
from ultramem_megatron.presets.flags import as_words, flags

BARS = {
    "dense": "dense",
    "moe": "MoE, Megatron's loop over experts",
    "moe-grouped": "MoE, one grouped product of experts",
    "ultramem": "UltraMem",
}
"""What is measured, by the kind that rows have; in words, for pictures and readers."""


class DecodeModel(NamedTuple):
    """kind: dense, moe or ultramem. flags: Megatron's and ours, the later ones win."""

    kind: str
    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Scale:
    """Models and sizes of one benchmark run."""

    trio: tuple[DecodeModel, ...]
    fewer: tuple[DecodeModel, ...]
    """The same with fewer sparse parameters, measured at `fixed_batch` only."""
    batches: Sequence[int]
    fixed_batch: int
    cache_length: int
    """Tokens already in the KV cache."""
    extra_flags: tuple[str, ...] = field(default=("--bf16",))
    seconds: float = 2.0
    """Of steps at each point, about."""


_POWERS = tuple(2**i for i in range(11))  # 1..1024
_SMALL = as_words({**plain_gpt(layers=4, hidden=64, heads=4, length=64), "vocab-size": 512})


def _preset(kind: str, name: str, *changes: str) -> DecodeModel:
    words = [*flags(name, model=True, training=False), "--vocab-size", "50304", *changes]
    return DecodeModel(kind, " ".join([name, *changes]), tuple(words))


def _small(kind: str, name: str, **flags: str | int) -> DecodeModel:
    return DecodeModel(kind, f"small {name}", (*_SMALL, *as_words(flags)))


def _small_moe(experts: int) -> DecodeModel:
    return _small(
        "moe",
        f"moe-2in{experts}",
        num_experts=experts,
        moe_router_topk=2,
        moe_ffn_hidden_size=136,
        moe_router_load_balancing_type="none",
    )


def _small_ultramem(keys: int) -> DecodeModel:
    return _small(
        "ultramem",
        f"ultramem-{keys}",
        ultramem_spans="2:3",
        ultramem_num_keys=keys,
        ultramem_key_dim=16,
        ultramem_topk=8,
    )


def _paper(
    size: str, moe: str, *, experts: Sequence[int], keys: Sequence[int], batch: int, cache: int
) -> Scale:
    """The paper's trio of one size; experts, keys: numbers of those with fewer of them."""
    dense, ultramem = f"dense-{size}", f"ultramem-{size}-x12"
    return Scale(
        # Experts last: they take longest, and a run may be cut short.
        trio=(_preset("dense", dense), _preset("ultramem", ultramem), _preset("moe", moe)),
        fewer=(
            *(_preset("moe", moe, "--num-experts", str(n)) for n in experts),
            *(_preset("ultramem", ultramem, "--ultramem-num-keys", str(n)) for n in keys),
        ),
        batches=_POWERS,
        fixed_batch=batch,
        cache_length=cache,
    )


SCALES: dict[str, Scale] = {
    "small": Scale(
        trio=(_small("dense", "dense"), _small_moe(12), _small_ultramem(128)),
        fewer=(_small_moe(4), _small_ultramem(64)),
        batches=(1, 4),
        fixed_batch=4,
        cache_length=8,
        seconds=0.02,
    ),
    "151m": _paper(
        "151m", "moe-151m-2in32", experts=(4, 8, 16), keys=(320, 524, 766), batch=64, cache=32
    ),
    "1.6b": _paper(
        "1.6b", "moe-1.6b-2in34", experts=(4, 8, 17), keys=(480, 820, 1250), batch=512, cache=2048
    ),
}
