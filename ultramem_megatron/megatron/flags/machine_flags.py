"""Megatron flags this machine cannot do without, filled in where the user gave none.

Not a patch: it only completes the command line, so that the same short command trains on a laptop
and on a cluster. On a machine with CUDA, Transformer Engine and Apex nothing is added.
"""

import importlib.util
import os
from collections.abc import Sequence

from ultramem_megatron.errors import UltraMemError

_FSDP = {"--use-torch-fsdp2", "--use-megatron-fsdp"}
"""They ask for more than one connection."""


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def needed_flags(*, bare: bool = False) -> dict[str, tuple[str, ...]]:
    """Flag -> its values, for everything Megatron turns on by default and this machine lacks.

    bare: as if it had none of CUDA, Transformer Engine and Apex.
    """
    import torch  # takes seconds; --help needs none

    cuda = torch.cuda.is_available() and not bare
    transformer_engine = _has("transformer_engine")
    fused_norm = transformer_engine or _has("apex")
    flags: dict[str, tuple[str, ...]] = {}
    if not cuda:
        flags["--distributed-backend"] = ("gloo",)
        flags["--use-cpu-initialization"] = ()
        flags["--no-bias-gelu-fusion"] = ()
        flags["--no-bias-swiglu-fusion"] = ()
        flags["--no-bias-dropout-fusion"] = ()
    if not (cuda and transformer_engine):
        flags["--transformer-impl"] = ("local",)
        flags["--no-rope-fusion"] = ()
    if not (cuda and fused_norm):
        flags["--no-persist-layer-norm"] = ()
    if not (cuda and _has("fused_weight_gradient_mlp_cuda")):
        flags["--no-gradient-accumulation-fusion"] = ()
    if not (cuda and _has("scaled_masked_softmax_cuda")):
        flags["--no-masked-softmax-fusion"] = ()
    return flags


def complete(argv: Sequence[str]) -> list[str]:
    """`argv` with the missing flags of `needed_flags` appended; says so in one line on rank 0.

    A flag the user wrote, as `--flag value` or `--flag=value`, is left as it is.
    """
    import torch

    given = {argument.split("=", 1)[0] for argument in argv}
    needed = needed_flags()
    if "--use-megatron-fsdp" in given and not torch.cuda.is_available():
        needed["--no-gradient-reduce-div-fusion"] = ()  # gloo does not scale what it sums
    missing = {flag: values for flag, values in needed.items() if flag not in given}
    added = [word for flag, values in missing.items() for word in (flag, *values)]
    if "--yaml-cfg" in given:
        raise UltraMemError(
            "--yaml-cfg: Megatron reads no other flag beside it, so memory layers would be left "
            "out. Give what it says as flags."
        )
    if not (torch.cuda.is_available() or given & _FSDP):
        # Asked for with tensor parallelism on GPUs before Blackwell; a CPU has no queues to order.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if added and os.environ.get("RANK", "0") == "0":
        print(f"ultramem_megatron: this machine also needs {' '.join(added)}", flush=True)
    return [*argv, *added]
