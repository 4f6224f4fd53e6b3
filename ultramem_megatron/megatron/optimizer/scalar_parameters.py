"""What matrix optimizers (Muon, SOAP, ...) leave to the scalar one, as they leave embeddings.

They treat every two-dimensional parameter as a linear map. A value table is none, and of one cut
over ranks each would orthogonalise its own part; the convolution's taps are none either. Keys and
cores have more dimensions, which Megatron gives to the scalar optimizer by itself.

--use-mup, too, knows matrices, whose rate it divides by the width, and embeddings, whose rate it
keeps. Tables, taps and cores sum over no width, so they keep the base rate and Adam's epsilon;
projections and keys are matrices to it.
"""

from megatron.core.optimizer import ParamKey

from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.tables.value_table import VALUES_TAG

_WITHOUT_WIDTH = ("values.weight", "query.conv.weight", "cores.weight")
"""How the names of these parameters end."""


def leave_to_scalar_optimizer() -> None:
    """Enter them into Megatron's list of what each optimizer leaves alone; repeating it is no harm.

    With `muon` Megatron puts --muon-scalar-optimizer in the place of adam. Versions before 0.19
    have no such list.
    """
    try:
        from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS
    except ImportError:
        return
    for entry in _EMERGING_OPTIMIZERS.values():
        key = ParamKey(name="*.query.conv.weight", attr=VALUES_TAG)
        entry.default_param_overrides[key] = {"optimizer": "adam"}


def keep_base_rate(layer: UltraMemLayer) -> None:
    """Tag what --use-mup is to treat as embeddings."""
    for name, parameter in layer.named_parameters():
        if name.endswith(_WITHOUT_WIDTH):
            parameter.is_embedding_parameter = True  # type: ignore[attr-defined]  # Megatron's tag
