"""GPTs of Megatron's spec for Transformer Engine, dense and with memories, built and loaded.

`python -m tests.megatron.engine.case FOLDER VERSION` prints JSON for test_transformer_engine.py.
"""

import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from tests.megatron.engine import stand_in
from tests.ranks import free_port

_RECIPES = [
    ("fp8", "hybrid", "delayed"),
    ("fp8", "hybrid", "tensorwise"),
    ("fp8", "e4m3", "blockwise"),
    ("fp8", "e4m3", "mxfp8"),
    ("fp4", "e2m1", "nvfp4"),
]


def main(folder, version):
    """What the models are made of, how they are named, and whether one loads the other."""
    stand_in.install(Path(folder), version)
    groups = _groups()
    dense, memory = _model(with_memories=False), _model()
    report = {
        "layers": [_kinds(layer) for layer in memory.decoder.layers],
        "keys": [sorted(model.state_dict()) for model in (dense, memory)],
        "sharded": [_sharded(model, groups) for model in (dense, memory)],
        "meta": sorted(
            {p.device.type for name, p in _model("meta").named_parameters() if ".memory." in name}
        ),
        "differ after upcycling": _upcycled(dense, memory, groups),
        "recipes": {" ".join(recipe): _of_recipe(*recipe) for recipe in _RECIPES},
    }
    print(json.dumps(report))


def _groups():
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from ultramem_megatron.patches import registry

    registry.apply_all()
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _model(device="cpu", with_memories=True, **settings):
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer import TransformerConfig

    from launch.own_loop import LENGTH, ULTRAMEM, VOCABULARY
    from ultramem_megatron.megatron.layer.specs import with_memory

    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        use_cpu_initialization=device == "cpu",
        init_model_with_meta_device=device == "meta",
        hetereogenous_dist_checkpoint=True,
        **settings,
    )
    spec = get_gpt_layer_with_transformer_engine_spec()
    if with_memories:
        spec = with_memory(spec, ULTRAMEM, config)
    # Its constructors ask for CUDA.
    with torch.device(device), patch.object(torch.cuda, "is_available", lambda: True):
        return GPTModel(config, spec, VOCABULARY, LENGTH, position_embedding_type="rope")


def _of_recipe(bits, numbers, recipe):
    """Of a model whose weights are kept in low precision: what is, and what memories are."""
    import torch
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    low = {bits: numbers, f"{bits}_recipe": recipe, f"{bits}_param": True}
    model = _model("meta", bf16=True, params_dtype=torch.bfloat16, **low)
    engines = {
        name
        for name, part in model.named_modules()
        if isinstance(part, TransformerEngineBaseModule) and part.primary_weights_in_fp8
    }
    memories = [layer.memory for layer in model.decoder.layers if getattr(layer, "memory", None)]
    return {
        "in low precision": sorted({name.rpartition(".")[2] for name in engines}),
        "in a memory": sorted(name for name in engines if ".memory." in name),
        "dtypes of memories": sorted({str(p.dtype) for m in memories for p in m.parameters()}),
        "kinds of parameters": sorted({type(p).__name__ for m in memories for p in m.parameters()}),
    }


def _kinds(layer):
    """Of norm and first product."""
    kinds = [type(part) for part in (layer.pre_mlp_layernorm, layer.mlp.linear_fc1)]
    return [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in kinds]


def _sharded(model, groups):
    state = model.sharded_state_dict(metadata=groups)
    return sorted(getattr(value, "key", name) for name, value in state.items())


def _upcycled(dense, memory, groups):
    """Names of dense weights that the model with memories has other values for, once loaded."""
    import torch
    from megatron.core import dist_checkpointing

    from ultramem_megatron.megatron.upcycle import start_from_dense

    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(torch.rand_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save(dense.sharded_state_dict(metadata=groups), folder)
        start_from_dense([memory], folder)
    loaded = {
        name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"): value
        for name, value in memory.named_parameters()
    }
    return [
        name for name, value in dense.named_parameters() if not torch.equal(value, loaded[name])
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
