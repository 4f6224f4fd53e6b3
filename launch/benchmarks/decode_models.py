"""The models that a decode benchmark compares, at three scales.

Each trio has equal FLOPs per token; MoE and UltraMem have equal parameters too (the paper's
figures 1 and 7). For figure 6c their sparse parameters shrink: fewer experts, fewer values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ultramem_megatron.presets import find_preset
from ultramem_megatron.presets.preset import as_words


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


_VOCABULARY = ("--vocab-size", "50304")


def _preset(kind: str, name: str, *changes: str) -> DecodeModel:
    preset = find_preset(name)
    flags = [*as_words(preset.model), *as_words(preset.memory, "--ultramem-"), *_VOCABULARY]
    shown = " ".join([name, *changes])
    return DecodeModel(kind, shown, (*flags, *changes))


_POWERS = tuple(2**i for i in range(11))  # 1..1024

_SMALL = ("--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4",
          "--seq-length", "64", "--max-position-embeddings", "64", "--vocab-size", "512",
          "--position-embedding-type", "rope", "--untie-embeddings-and-output-weights",
          "--disable-bias-linear")  # fmt: skip


def _small(kind: str, name: str, *flags: str) -> DecodeModel:
    return DecodeModel(kind, f"small {name}", (*_SMALL, *flags))


def _small_moe(experts: int) -> DecodeModel:
    return _small("moe", f"moe-2in{experts}", "--num-experts", str(experts),
                  "--moe-router-topk", "2", "--moe-ffn-hidden-size", "136",
                  "--moe-router-load-balancing-type", "none")  # fmt: skip


def _small_ultramem(keys: int) -> DecodeModel:
    return _small("ultramem", f"ultramem-{keys}", "--ultramem-spans", "2:3",
                  "--ultramem-num-keys", str(keys), "--ultramem-key-dim", "16",
                  "--ultramem-topk", "8")  # fmt: skip


SCALES: dict[str, Scale] = {
    "small": Scale(
        trio=(_small("dense", "dense"), _small_moe(12), _small_ultramem(128)),
        fewer=(_small_moe(4), _small_ultramem(64)),
        batches=(1, 4),
        fixed_batch=4,
        cache_length=8,
    ),
    "151m": Scale(
        trio=(
            _preset("dense", "dense-151m"),
            _preset("moe", "moe-151m-2in32"),
            _preset("ultramem", "ultramem-151m-x12"),
        ),
        fewer=tuple(
            [_preset("moe", "moe-151m-2in32", "--num-experts", str(n)) for n in (4, 8, 16)]
            + [
                _preset("ultramem", "ultramem-151m-x12", "--ultramem-num-keys", str(n))
                for n in (320, 524, 766)
            ]
        ),
        batches=_POWERS,
        fixed_batch=64,
        cache_length=32,
    ),
    "1.6b": Scale(
        trio=(
            _preset("dense", "dense-1.6b"),
            _preset("moe", "moe-1.6b-2in34"),
            _preset("ultramem", "ultramem-1.6b-x12"),
        ),
        fewer=tuple(
            [_preset("moe", "moe-1.6b-2in34", "--num-experts", str(n)) for n in (4, 8, 17)]
            + [
                _preset("ultramem", "ultramem-1.6b-x12", "--ultramem-num-keys", str(n))
                for n in (480, 820, 1250)
            ]
        ),
        batches=_POWERS,
        fixed_batch=512,
        cache_length=2048,
    ),
}
