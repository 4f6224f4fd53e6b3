"""The provider for Megatron-Bridge gives the model of our own spec, the recipe that of a preset."""

import functools
from types import SimpleNamespace

import pytest

from tests.ranks import run_on_ranks

_SIZES = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 128,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "use_cpu_initialization": True,
    "cross_entropy_loss_fusion": False,
}


def _groups():
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from tests.training.bridge import stand_in
    from ultramem_megatron.patches import registry

    registry.apply_all()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    stand_in.install()
    return ProcessGroupCollection.use_mpu_process_groups()


def _local_spec(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec()


def _provider(groups, **changes):
    from launch.own_loop import ULTRAMEM
    from ultramem_megatron.training.bridge.provider import UltraMemGPTModelProvider

    settings = {
        **_SIZES,
        "seq_length": 16,
        "vocab_size": 64,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "ultramem": ULTRAMEM,
        "transformer_layer_spec": _local_spec,
    }
    provider = UltraMemGPTModelProvider(**{**settings, **changes})
    provider._pg_collection = groups
    provider.finalize()
    return provider


def _loss(model):
    import torch

    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    return model(tokens[:, :-1], torch.arange(16).expand(2, -1), mask, labels=tokens[:, 1:]).mean()


def _same_as_spec():
    """Losses and gradients through the provider, and of a GPT built with our spec by hand."""
    groups = _groups()
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from launch.own_loop import ULTRAMEM
    from ultramem_megatron.megatron.layer.specs import with_memory
    from ultramem_megatron.memory.layer import memory_layers

    results = []
    for by_hand in (False, True):
        torch.manual_seed(7)
        if by_hand:
            config = TransformerConfig(**_SIZES, hetereogenous_dist_checkpoint=True)
            spec = with_memory(_local_spec(config), ULTRAMEM, config)
            model = GPTModel(config, spec, 64, 16, position_embedding_type="rope")
        else:
            model = _provider(groups).provide(pre_process=True, post_process=True)
        assert len(list(memory_layers(model))) == 2
        loss = _loss(model)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.item(), gradients))
    return results


def test_the_provider_builds_the_model_of_our_spec():
    (result,) = run_on_ranks(1, _same_as_spec)
    (loss, gradients), (expected_loss, expected) = result
    assert loss == expected_loss
    assert gradients.keys() == expected.keys()
    assert any("memory.values" in name for name in gradients)
    for name, gradient in expected.items():
        assert gradients[name].equal(gradient), name


def _auxiliary_gradients():
    """Gradients of the cores, finalized as Bridge sets it, and of the auxiliary loss alone."""
    groups = _groups()
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads

    from launch.own_loop import ULTRAMEM
    from ultramem_megatron.memory.layer import memory_layers

    strong = functools.partial(type(ULTRAMEM), **{**vars(ULTRAMEM), "aux_loss_weight": 1.0})
    provider = _provider(groups, ultramem=strong(aux_loss_margin=0.0))
    models = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        use_cpu_initialization=True,
        pg_collection=groups,
    )
    # What megatron.bridge.training.setup does once the optimizer is made.
    provider.finalize_model_grads_func = functools.partial(
        finalize_model_grads, pg_collection=groups
    )
    provider.grad_scale_func = lambda loss: loss
    found = []
    for chunk in models:
        chunk.zero_grad_buffer()
        for layer in memory_layers(chunk):
            (expected,) = torch.autograd.grad(layer.auxiliary_loss(), layer.retrieval.cores.weight)
            found.append((layer.retrieval.cores.weight, expected))
    provider.finalize_model_grads_func(models)
    return [(weight.main_grad.clone(), expected) for weight, expected in found]


def test_the_auxiliary_loss_follows_whatever_bridge_finalizes_with():
    (found,) = run_on_ranks(1, _auxiliary_gradients)
    assert len(found) == 2
    for gradient, expected in found:
        assert expected.abs().sum() > 0
        assert gradient.equal(expected)


def _refused(changes):
    groups = _groups()
    from ultramem_megatron.errors import UltraMemError

    try:
        _provider(groups, **changes)
    except UltraMemError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("cuda_graph_impl", "full_iteration", "cannot be combined with memory layers"),
        ("fp8", "hybrid", "fp8=hybrid needs Transformer Engine"),
    ],
)
def test_what_cannot_be_combined_or_is_missing_is_refused(setting, value, message):
    assert message in run_on_ranks(1, _refused, {setting: value})[0]


def _recipe():
    _groups()
    from ultramem_megatron.training.bridge.recipe import ultramem_pretrain_config

    cfg = ultramem_pretrain_config("ultramem-151m-x12")
    overrides = cfg.optimizer_config_override_provider.build_config_overrides(
        SimpleNamespace(optimizer_config=SimpleNamespace(lr=6e-4, min_lr=6e-5))
    )
    model = cfg.model
    return (
        [
            model.num_layers,
            model.hidden_size,
            model.add_bias_linear,
            model.ultramem.num_keys,
            model.share_embeddings_and_output_weights,
            str(model.ultramem.spans[0]),
        ],
        [
            cfg.train.train_iters,
            cfg.train.global_batch_size,
            cfg.optimizer.lr,
            cfg.optimizer.adam_beta2,
            cfg.scheduler.lr_warmup_fraction,
            cfg.dataset.seq_length,
        ],
        [str(key) for key in overrides],
        list(overrides.values())[-1],
    )


def test_the_recipe_is_the_preset():
    ((model, training, keys, values),) = run_on_ranks(1, _recipe)
    assert model == [12, 1024, False, 1100, False, "3:5"]
    assert training == [238418, 2048, 6e-4, 0.95, 0.01, 2048]
    assert "ultramem_values" in keys[-1]
    assert values == {"lr_mult": 10.0, "max_lr": pytest.approx(6e-3), "min_lr": pytest.approx(6e-4)}


_SCHEDULE = {
    "init_lr": 0.0,
    "max_lr": 1e-3,
    "min_lr": 1e-4,
    "lr_warmup_steps": 8,
    "lr_decay_steps": 60,
    "lr_decay_style": "cosine",
    "start_wd": 0.1,
    "end_wd": 0.1,
    "wd_incr_steps": 80,
    "wd_incr_style": "constant",
}


def _rates(*changes):
    """Of each design the learning rates of base and tables, as `_rates_of`."""
    _groups()
    from launch.own_loop import ULTRAMEM

    return [_rates_of(type(ULTRAMEM)(**{**vars(ULTRAMEM), **one})) for one in changes]


def _rates_of(design):
    """Step by step: by our scheduler, and in Bridge's loop."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from ultramem_megatron.megatron.optimizer.value_learning_rate import ValueLearningRateScheduler
    from ultramem_megatron.training.bridge.recipe import _value_overrides, value_rate_fall

    config = SimpleNamespace(lr=_SCHEDULE["max_lr"], min_lr=_SCHEDULE["min_lr"])
    context = SimpleNamespace(optimizer_config=config)
    (*_, override) = _value_overrides(design).build_config_overrides(context).values()
    times = 0.0 if design.value_lr_fixed else design.value_lr_mult
    ours, bridges = (
        SimpleNamespace(param_groups=[{"params": []}, {"params": [], **tables}])
        for tables in ({"lr_mult": times}, override)
    )
    fixed = design.value_lr_fixed
    schedulers = (
        ValueLearningRateScheduler(ours, value_lr_decay=0.5, value_lr_fixed=fixed, **_SCHEDULE),
        OptimizerParamScheduler(bridges, **_SCHEDULE),
    )
    fall = value_rate_fall(design)
    rates = []
    for _ in range(10):
        fall.on_train_step_start(SimpleNamespace(scheduler=schedulers[1], optimizer=bridges))
        rates.append([[group["lr"] for group in o.param_groups] for o in (ours, bridges)])
        for scheduler in schedulers:
            scheduler.step(8)
    return rates


def test_tables_learn_at_the_rate_of_our_own_command():
    ((rates, fixed),) = run_on_ranks(1, _rates, {"value_lr_decay": 0.5}, {"value_lr_fixed": 7e-3})
    for ours, bridges in (*rates, *fixed):
        assert bridges == pytest.approx(ours)
    assert {bridges[1] for _, bridges in fixed} == {7e-3}
    assert rates[1][1][1] == pytest.approx(rates[1][1][0] * (1 + 3 * (1 - 0.1 / 0.5)))
    assert rates[-1][1][0] == pytest.approx(rates[-1][1][1])


def test_without_bridge_it_says_what_to_install():
    with pytest.raises(Exception, match="Install megatron-bridge with Transformer Engine"):
        from ultramem_megatron.training.bridge import provider  # noqa: F401 - the import itself is what fails
