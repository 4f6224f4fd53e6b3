"""The models that the training benchmark compares: equal FLOPs per token within a scale.

Mixture of experts and UltraMem have equal parameters too, product keys the same (at 151m the
paper's PKM-151M-x10, which has fewer). The dense model's MLP is widened to the others' FLOPs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from launch.small_models import plain_gpt
from ultramem_megatron.presets.flags import as_words, flags


@dataclass(frozen=True)
class Scale:
    """Flags of each model, and those of all."""

    models: Mapping[str, tuple[str, ...]]
    common: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _preset(name: str, changes: str = "") -> tuple[str, ...]:
    return (*flags(name, model=True, training=False), *_words(changes))


_SMALL = " ".join(as_words(plain_gpt(layers=6, hidden=256, heads=4, length=256))) + " "
_TINY = " ".join(as_words(plain_gpt(layers=2, hidden=32, heads=2, length=32))) + " "
_MOE = "--moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 "
_PKM = (
    "--ultramem-retrieval pkm --ultramem-value-expansion 1 --no-ultramem-value-projection "
    "--ultramem-softmax --no-ultramem-share-query --ultramem-qk-norm none --ultramem-init official "
)
_TRAINING = (
    "--mock-data --tokenizer-type NullTokenizer --lr 1e-4 --min-lr 1e-5 --eval-iters 0 "
    "--eval-interval 100000 --hidden-dropout 0 --attention-dropout 0 --num-workers 0 "
)

SCALES: dict[str, Scale] = {
    "tiny": Scale(
        {
            "dense": _words(_TINY + "--ffn-hidden-size 168"),
            "moe": _words(_TINY + _MOE + "--num-experts 3 --moe-ffn-hidden-size 84"),
            "pkm": _words(
                _TINY + _PKM + "--ultramem-spans 2:2 --ultramem-num-keys 12 --ultramem-key-dim 28 "
                "--ultramem-value-dim 32 --ultramem-topk 4"
            ),
            "ultramem": _words(
                _TINY + "--ultramem-spans 1:2 --ultramem-num-keys 25 --ultramem-key-dim 12 "
                "--ultramem-value-dim 16 --ultramem-topk 4"
            ),
        },
        _words(_TRAINING + "--vocab-size 512 --micro-batch-size 2 --global-batch-size 2"),
    ),
    "small": Scale(
        {
            "dense": _words(_SMALL + "--ffn-hidden-size 1220"),
            "moe": _words(_SMALL + _MOE + "--num-experts 11 --moe-ffn-hidden-size 610"),
            "pkm": _words(
                _SMALL + _PKM + "--ultramem-spans 3:3 --ultramem-num-keys 256 "
                "--ultramem-key-dim 288 --ultramem-value-dim 256 --ultramem-topk 8"
            ),
            "ultramem": _words(
                _SMALL + "--ultramem-spans 2:3/5:6 --ultramem-num-keys 256 --ultramem-key-dim 64 "
                "--ultramem-value-dim 128 --ultramem-topk 16"
            ),
        },
        _words(_TRAINING + "--vocab-size 4096 --micro-batch-size 4 --global-batch-size 4"),
    ),
    "151m": Scale(
        {
            "dense": _preset("dense-151m", "--ffn-hidden-size 5024"),
            "ultramem": _preset("ultramem-151m-x12"),
            "pkm": _preset("pkm-151m-x10"),
            "moe": _preset("moe-151m-2in32"),  # last: it takes longest
        },
        _words(_TRAINING + "--vocab-size 50277 --micro-batch-size 4 --global-batch-size 8 --bf16"),
    ),
}
