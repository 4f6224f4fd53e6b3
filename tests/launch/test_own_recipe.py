"""Memory layers in a recipe of one's own: config, builder, spec function, training by hand."""

import torch

from tests.ranks import run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt


def _initialise():
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from ultramem_megatron.patches import registry

    registry.apply_all()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def _transformer_config(**changes):
    from megatron.core.transformer import TransformerConfig

    settings = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "params_dtype": torch.float32,
    }
    return TransformerConfig(**{**settings, **changes})


def _ultramem():
    from ultramem_megatron.memory.config import UltraMemConfig
    from ultramem_megatron.memory.spans import parse_spans

    return UltraMemConfig(
        spans=parse_spans("1:2/3:4", 4), num_keys=12, key_dim=16, value_dim=16, topk=6
    )


def _train_by_hand(through_builder):
    """A few steps of plain torch training; the losses."""
    _initialise()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection

    from ultramem_megatron.megatron.layer.specs import with_memory
    from ultramem_megatron.megatron.model import UltraMemGPTModelBuilder, UltraMemGPTModelConfig
    from ultramem_megatron.memory.layer import memory_layers

    config = _transformer_config()
    if through_builder:
        model_config = UltraMemGPTModelConfig(
            transformer=config,
            ultramem=_ultramem(),
            vocab_size=64,
            seq_length=16,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model_config.transformer.transformer_impl = "local"
        model = UltraMemGPTModelBuilder(model_config).build_model(groups)
    else:
        spec = with_memory(get_gpt_layer_local_spec(), _ultramem(), config)
        model = GPTModel(
            config,
            spec,
            vocab_size=64,
            max_sequence_length=16,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
        )
    assert len(list(memory_layers(model))) == 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16).expand(4, -1)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    losses = []
    for _ in range(8):
        loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_spec_function_and_builder_give_the_same_model():
    by_builder = run_on_ranks(1, _train_by_hand, True)[0]
    by_spec = run_on_ranks(1, _train_by_hand, False)[0]
    assert by_spec == by_builder
    assert by_spec[-1] < by_spec[0] - 0.3


def test_upstream_specs_are_not_modified():
    run_on_ranks(1, _compare_specs)


def _compare_specs():
    _initialise()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from ultramem_megatron.megatron.layer.specs import with_memory

    upstream = get_gpt_layer_local_spec()
    before = (upstream.module, dict(vars(upstream.submodules)))
    block = with_memory(upstream, _ultramem(), _transformer_config())
    assert (upstream.module, dict(vars(upstream.submodules))) == before
    modules = [layer.module.__name__ for layer in block.layer_specs]
    assert modules == ["UltraMemTransformerLayer"] * 4
    memories = [layer.submodules.memory is not None for layer in block.layer_specs]
    assert memories == [True, False, True, False]


def test_a_fused_pre_mlp_norm_is_taken_out():
    run_on_ranks(1, _separate_a_fused_norm)


def _separate_a_fused_norm():
    """Transformer Engine's spec, with stand-ins for its classes."""
    _initialise()
    import functools

    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    from ultramem_megatron.megatron.layer.specs import with_memory

    provider.TEColumnParallelLinear, provider.TENorm = "column", "norm"
    for mlp in (
        functools.partial(
            MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1="fused", linear_fc2="row")
        ),
        ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1="fused", linear_fc2="row")),
    ):
        upstream = ModuleSpec(
            module=TransformerLayer, submodules=TransformerLayerSubmodules(mlp=mlp)
        )
        block = with_memory(upstream, _ultramem(), _transformer_config())
        reads, passes = (block.layer_specs[index].submodules for index in (0, 1))
        assert reads.pre_mlp_layernorm == "norm"
        assert _linear_fc1(reads.mlp) == "column"
        assert reads.sharded_state_dict_keys_map == {
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"
        }
        assert passes.pre_mlp_layernorm is IdentityOp
        assert _linear_fc1(passes.mlp) == _linear_fc1(mlp) == "fused"


def _linear_fc1(mlp):
    submodules = mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]
    return submodules.linear_fc1


def _flop_count(trained):
    """FLOPs of one step, as --log-throughput takes them."""
    from megatron.training import training

    return training.num_floating_point_operations(trained.args, trained.args.global_batch_size)


def test_throughput_and_parameter_reports_count_the_memory(capfd):
    flags = {"num_layers": 4, "train_iters": 3, "log_throughput": True}
    memory = {"ultramem_spans": "1:1/3:3", "ultramem_num_keys": 12, "ultramem_topk": 6}
    memory["ultramem_replace_mlp"] = True
    plain = run_pretrain(1, tiny_gpt(**flags), on_finish=_flop_count)
    capfd.readouterr()
    counted = run_pretrain(1, tiny_gpt(**flags, **memory), on_finish=_flop_count, print_output=True)
    # Queries 2*16*32, keys 2*2*24*16, cores 2*2*2*2, norms 16+16, projection 4*16*32: 4656
    # parameters; 2*6*16 values read per token; two matrices of 32*128 in each MLP replaced.
    per_token = 2 * 2 * (4656 + 192 - 2 * 32 * 128)
    tokens = 8 * 32
    added = counted.ranks[0].finished - plain.ranks[0].finished
    assert added == 3 * tokens * per_token
    assert "parameters in memory layers in billions" in capfd.readouterr().out


def test_start_up_prints_the_plan():
    from ultramem_megatron.megatron.startup import describe_memories

    assert describe_memories(_ultramem(), 32) == (
        " > UltraMem: 2 memory layers at spans 1:2/3:4, 144 values x 16 each; parameters: 4608 "
        "sparse (value tables), 9312 dense; 19392 FLOPs per token forward"
    )


def test_a_plain_gpt_trains_the_same_with_and_without_our_patches():
    from ultramem_megatron.patches.registry import all_patches

    ours = {"doors.optimizer_config", "doors.training_log", "doors.flops", "doors.footprint"}
    machine = {patch.name for patch in all_patches()} - ours
    with_all = run_pretrain(1, tiny_gpt(), parameters=True)
    without = run_pretrain(1, tiny_gpt(), patches=machine, parameters=True)
    assert with_all.losses == without.losses
    for name, parameter in without.ranks[0].parameters.items():
        assert torch.equal(with_all.ranks[0].parameters[name], parameter)
