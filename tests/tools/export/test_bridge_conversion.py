"""Megatron-Bridge's own conversion makes the model of a folder, and a folder of the model.

It needs Bridge's files (MEGATRON_BRIDGE_PATH, see tests/training/bridge/stand_in.py), which ask for
Transformer Engine where they are imported; what stands for it here computes nothing.
"""

import os
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.tools.export.models import FAMILY, MODELS, flags, shaken, tokens

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        "MEGATRON_BRIDGE_PATH" not in os.environ,
        reason="MEGATRON_BRIDGE_PATH names no unpacked wheel of Megatron-Bridge",
    ),
]
_CASES = {
    "swiglu": MODELS["swiglu"],
    "learned": MODELS["learned"],
    "convolution": MODELS["convolution"],
    "ultramemv2": FAMILY["ultramemv2"],
    "memory+": FAMILY["memory+"],
    "peer": FAMILY["peer"],
}


def _auto_bridge():
    """Bridge's AutoBridge, which knows our folders."""
    import megatron.core.extensions.transformer_engine  # noqa: F401  # before one can be found

    sys.path.append(os.environ["MEGATRON_BRIDGE_PATH"])
    engine = types.ModuleType("transformer_engine.pytorch")
    engine.ops = types.SimpleNamespace(Sequential=object)
    above = types.ModuleType("transformer_engine")
    above.pytorch = engine
    stand_ins = {above.__name__: above, engine.__name__: engine}
    # One of Bridge's models is compiled when it is imported, by what is patched for a CPU.
    sys.modules.update(stand_ins)
    with mock.patch("torch.compile", lambda function, **_: function):
        from megatron.bridge.models.conversion.auto_bridge import AutoBridge
    for name in stand_ins:
        del sys.modules[name]
    import ultramem_megatron.tools.export.bridge  # noqa: F401  # registers

    return AutoBridge


def _converted(folder, changes):
    """Logits of a model and of what Bridge makes of its folder; both folders' tensors."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection

    from tests.decoding import full_logits
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.megatron.checkpoint.weights import save_weights
    from ultramem_megatron.tools.export.__main__ import to_hf

    model, args = untrained_model(flags(changes))
    shaken(model)
    save_weights(model, args, folder / "checkpoint")
    to_hf(str(folder / "checkpoint"), str(folder / "hf"))
    bridge = _auto_bridge().from_hf_pretrained(str(folder / "hf"), trust_remote_code=True)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.transformer_layer_spec = lambda config: get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    provider.use_cpu_initialization = True
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    provider.finalize()
    made = provider.provide(True, True).eval()
    bridge.load_hf_weights([made])
    exported = dict(bridge.export_hf_weights([made], cpu=True, show_progress=False))
    return full_logits(model, tokens()), full_logits(made, tokens()), exported


@pytest.mark.parametrize("name", _CASES)
def test_bridge_gives_the_same_logits_and_tensors(name, tmp_path: Path):
    from safetensors.torch import load_file

    ((original, made, exported),) = run_on_ranks(1, _converted, tmp_path, _CASES[name])
    assert torch.equal(made, original)
    stored = load_file(tmp_path / "hf/model.safetensors")
    assert exported.keys() == stored.keys()
    for key, tensor in stored.items():
        assert torch.equal(exported[key], tensor), key
