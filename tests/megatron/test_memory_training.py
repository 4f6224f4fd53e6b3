"""Memory layers under Megatron's pretrain(): every way to run one model gives one result."""

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.training_runs import run_pretrain, tiny_gpt
from tests.whole_model import STEADY, assert_same_training, first_decided, train, train_watched

_MEMORY = {
    "num_layers": 6,
    "ultramem_spans": "2:3/4:6",
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
    "ultramem_query_conv_kernel": 3,
    "disable_bias_linear": True,
    **STEADY,
}


def _flags(**changes):
    return tiny_gpt(**{**_MEMORY, **changes})


def _run(world_size=1, **changes):
    return train(world_size, _flags(**changes))


_DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def with_dropout():
    return _run(**_DROPOUT)


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 4},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
        {"recompute_granularity": "selective", "recompute_modules": "core_attn"},
    ],
)
def test_recomputation_changes_nothing(recompute, with_dropout):
    assert_same_training(_run(**_DROPOUT, **recompute), with_dropout, 0.0)


def test_recomputation_of_the_mlp_changes_nothing():
    # Without --disable-bias-linear Megatron's own recomputation of an MLP does not end.
    recomputed = _run(recompute_granularity="selective", recompute_modules="mlp")
    assert_same_training(recomputed, _run(), 0.0)


_STRONG_PENALTY = {"ultramem_aux_loss_weight": 10.0, "ultramem_aux_loss_margin": 0.01}


@pytest.fixture(scope="module")
def one_process():
    """A seed, and what one process makes of it."""

    def attempt(seed):
        run, closest_call = train_watched(1, _flags(**_STRONG_PENALTY, seed=seed))
        return (seed, run), closest_call

    return first_decided(attempt)


def _check_like(one_process, world_size, *, gradients=True, **changes):
    seed, expected = one_process
    run = _run(world_size, **_STRONG_PENALTY, **changes, seed=seed)
    assert_same_training(run, expected, gradients=gradients)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"micro_batch_size": 4}),
        (1, {"micro_batch_size": 1, "calculate_per_token_loss": True}),
        (2, {}),
        (2, {"calculate_per_token_loss": True}),
        (2, {"tensor_model_parallel_size": 2}),
        (4, {"tensor_model_parallel_size": 2, "micro_batch_size": 1}),
    ],
)
def test_layouts_agree(one_process, world_size, changes):
    _check_like(one_process, world_size, **changes)


@pytest.mark.parametrize("overlap", [False, True])
def test_distributed_optimizer_agrees(one_process, overlap):
    flags = {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": overlap,
        "overlap_param_gather": overlap,
    }
    _check_like(one_process, 2, gradients=False, **flags)


def _initial_penalty_gradients():
    """d(auxiliary loss)/d(cores) of both memory layers before the first step, by layer number."""
    from ultramem_megatron.memory.config import UltraMemConfig
    from ultramem_megatron.memory.layer import UltraMemLayer
    from ultramem_megatron.memory.spans import Span

    gradients = {}
    for number in (2, 4):
        config = UltraMemConfig(
            spans=(Span(2, 3), Span(4, 6)),
            num_keys=12,
            key_dim=16,
            value_dim=16,
            topk=6,
            query_conv_kernel=3,
            aux_loss_weight=10.0,
            aux_loss_margin=0.01,
        )
        layer = UltraMemLayer(config, hidden_size=32, num_layers=6, layer_number=number)
        (gradients[number],) = torch.autograd.grad(
            layer.auxiliary_loss(), layer.retrieval.cores.weight
        )
    return gradients


@pytest.mark.parametrize(
    ("precision", "scale", "dtype"),
    [
        ({}, 1, torch.float32),
        ({"fp16": True, "initial_loss_scale": 1024}, 1024, torch.float16),
        ({"bf16": True}, 1, torch.bfloat16),
    ],
)
def test_penalty_enters_the_gradient_once_and_scaled(precision, scale, dtype):
    with_penalty = _run(**_STRONG_PENALTY, **precision).ranks[0].gradients
    without = _run(ultramem_aux_loss_weight=0.0, **precision).ranks[0].gradients
    for number, expected in _initial_penalty_gradients().items():
        (name,) = (n for n in without if f"layers.{number - 1}.memory.retrieval.cores" in n)
        added = with_penalty[name].float() - without[name].float()
        # The difference leaves what is much smaller than both; parameters are rounded to `dtype`.
        condition = (with_penalty[name].float().norm() / added.norm()).item()
        assert_close(added / scale, expected, rounding(dtype, 1, condition=condition), name)


@pytest.mark.parametrize("precision", [{"bf16": True}, {"fp16": True, "initial_loss_scale": 4096}])
def test_half_precision_follows_float32(one_process, precision):
    seed, expected = one_process
    run = _run(**_STRONG_PENALTY, **precision, seed=seed)
    # A mean over tokens, of which each is off by eps / 2 of bfloat16 or by another value picked.
    rel = torch.finfo(torch.bfloat16).eps / 2
    assert run.losses == pytest.approx(expected.losses, rel=rel)
    assert all(record["skipped"] == 0 for record in run.iterations)


def test_too_large_a_loss_scale_skips_the_step():
    run = run_pretrain(1, _flags(fp16=True, initial_loss_scale=2**32, train_iters=2))
    assert [record["skipped"] for record in run.iterations] == [1, 1]


def test_experts_and_memory_in_one_model():
    experts = {"num_experts": 4, "moe_router_topk": 2}
    plain = _run(**experts)
    recomputed = _run(
        **experts, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2
    )
    assert_same_training(recomputed, plain, 0.0)
    assert plain.losses[-1] < plain.losses[0]


def test_memory_in_every_layer():
    run = _run(ultramem_spans="full", num_layers=3)
    names = [name for name in run.ranks[0].parameters if name.endswith("memory.values.weight")]
    assert len(names) == 3
    assert all(run.ranks[0].gradients[name].norm() > 0 for name in names)


def test_dense_weights_do_not_depend_on_the_memory():
    frozen = {"lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0, "train_iters": 1}
    with_memory = run_pretrain(1, _flags(**frozen), parameters=True).ranks[0].parameters
    without = run_pretrain(
        1, tiny_gpt(num_layers=6, disable_bias_linear=True, **frozen), parameters=True
    )
    for name, parameter in without.ranks[0].parameters.items():
        assert torch.equal(with_memory[name], parameter), name
    assert len(with_memory) == len(without.ranks[0].parameters) + 16


def _groups(trained):
    optimizer = trained.optimizer
    named = {id(p): n for chunk in trained.model for n, p in chunk.named_parameters()}
    return [
        (group["lr"], group["lr_mult"], [named.get(id(p), "?") for p in group["params"]])
        for group in optimizer.param_groups
    ]


def test_tables_have_a_parameter_group_of_their_own():
    run = run_pretrain(1, _flags(ultramem_value_lr_mult=5.0), on_finish=_groups)
    groups = run.ranks[0].finished
    (tables,) = (group for group in groups if group[1] != 1.0)
    assert tables[1] == 5.0
    assert [name.rsplit("memory.")[-1] for name in tables[2]] == ["values.weight"] * 2
    base = next(lr for lr, multiplier, _ in groups if multiplier == 1.0)
    assert tables[0] == pytest.approx(base)  # training is over: back at the base rate
