"""The warm-up of the fused functions must not move the generator that initialises the weights.

It draws random tensors whose shapes hold the micro-batch size and the tensor-parallel size. On a
CPU they come from the generator of the initial weights, which then depend on both. With CUDA the
draws come from the GPU's generator, and weights from Megatron's own streams: nothing to mend there.
"""

from ultramem_megatron.patches.cpu.devices import without_cuda
from ultramem_megatron.patches.patch import Editor, Patch


def _no_warmup(tp_size: int | None = None) -> None:
    """Nothing is compiled on a CPU, so nothing needs warming up."""


def _install(editor: Editor) -> None:
    for module in ("initialize", "training"):
        editor.replace(
            f"megatron.training.{module}.set_jit_fusion_options", _no_warmup, ("tp_size",)
        )


PATCH = Patch(
    name="cpu.jit_warmup",
    symbols=("megatron.training.training.set_jit_fusion_options",),
    reason="pretrain() always calls it between seeding and building the model.",
    delete_when="The warm-up restores the state of the generators it uses.",
    install=_install,
    active=without_cuda,
    versions=">=0.19",
)
