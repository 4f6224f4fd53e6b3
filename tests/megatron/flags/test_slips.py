"""Slips that Megatron ends in a crash or a bare assertion for are one line that names the flag."""

import sys

import pytest

from tests.ranks import run_on_ranks
from tests.training_runs import tiny_gpt

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
    "vocab_size",
    "micro_batch_size",
    "global_batch_size",
    "train_iters",
    "save_interval",
    "log_interval",
    "rotary_base",
)
_SLIPS = {
    **{f"{name}=0": ({name: 0}, f"--{name.replace('_', '-')} 0: must be a") for name in _SIZES},
    "negative": ({"hidden_size": -32}, "--hidden-size -32: must be a whole number from 1 to 2147"),
    "seed": ({"seed": 2**63}, "--seed 9223372036854775808: must be a whole number from 0 to"),
    "layers": ({"num_layers": 2**31 - 1}, "--num-layers 2147483647: must be a whole number from"),
    "workers": ({"num_workers": -1}, "--num-workers -1: must be a whole number from 0"),
    "dropout": ({"hidden_dropout": 2}, "--hidden-dropout 2.0: must be a number from 0 to 1."),
    "nan": ({"clip_grad": "nan"}, "--clip-grad nan: must be a number"),
    "nan of any flag": ({"moe_aux_loss_coeff": "nan"}, "--moe-aux-loss-coeff [nan]: must be"),
    "infinite": ({"lr": "1e999"}, "--lr inf: must be a number from 0 to"),
    "rotary": ({"rotary_percent": 2}, "--rotary-percent 2.0: must be a number"),
    "heads": ({"num_attention_heads": 5}, "--hidden-size 32 is no multiple of --num-attention-he"),
    "groups": (
        {"group_query_attention": True, "num_query_groups": 3},
        "--num-attention-heads 4 is no multiple of --num-query-groups 3.",
    ),
    "experts": ({"num_experts": 2, "moe_router_topk": 4}, "--moe-router-topk 4 is more than"),
    "rope": ({"kv_channels": 5}, "--position-embedding-type rope turns pairs of numbers, but a he"),
    "biases": ({"num_experts": 2}, "(--transformer-impl local) do not train with biases. Add --d"),
    "vocabulary": ({"vocab_size": None}, "--tokenizer-type NullTokenizer needs --vocab-size"),
    "warm-up": ({"lr_warmup_iters": 10}, "--lr-warmup-iters 10: must be less than the 3 of --lr-"),
    "engine": ({"transformer_impl": "transformer_engine"}, "Transformer Engine is not installed"),
    "packed": (
        {"dataloader_inter_document_masking": True},
        "--dataloader-inter-document-masking needs --transformer-impl transformer_engine",
    ),
    "fp8": ({"fp8_format": "hybrid", "bf16": True}, "--fp8-format needs Transformer Engine, which"),
    "activations": ({"save_activations_interval": 1}, "-interval needs Transformer Engine, which"),
    "no norm": ({"qk_l2_norm": True}, "--qk-l2-norm does nothing in Megatron's own dense layers"),
    "recomputed biases": (
        {"recompute_granularity": "selective", "recompute_modules": "mlp"},
        "--recompute-modules mlp: MLPs of Megatron's own layers",
    ),
    "deep_ep": (
        {"num_experts": 2, "disable_bias_linear": True, "moe_token_dispatcher_type": "flex"},
        "--moe-token-dispatcher-type flex needs the package deep_ep",
    ),
    "async": (
        {"async_save": True, "use_persistent_ckpt_worker": True},
        "--async-strategy nvrx: its writer copies from a GPU, and torch sees none here",
    ),
    "async in the foreground": (
        {"async_save": True, "async_strategy": "mcore"},
        "--async-save does nothing without --use-persistent-ckpt-worker",
    ),
    "one set as a whole": ({"full_validation": True}, "--full-validation: Megatron ends in a Type"),
    "several sets": (
        {"multiple_validation_sets": True, "eval_iters": 1},
        "--multiple-validation-sets: Megatron evaluates several sets as wholes only",
    ),
    "parallel load": ({"ckpt_fully_parallel_load": True}, "--ckpt-fully-parallel-load: Megatron d"),
    "yaml": ({"yaml_cfg": "gpt.yaml"}, "--yaml-cfg: Megatron reads no other flag beside it"),
    "nccl": ({"distributed_backend": "nccl"}, "--distributed-backend nccl: torch sees no GPU"),
    "optimizer": ({"optimizer": "muon"}, "--optimizer muon needs the package emerging-optimizers"),
    "length": ({"seq_length": 64}, "max_position_embeddings (32) must be greater than or equal to"),
    "batch": ({"global_batch_size": 9}, "(9) must be divisible by"),
    "both halves": (
        {"fp16": True, "bf16": True},
        "Megatron refuses these flags: assert not args.b",
    ),
}


def _messages(flag_sets):
    from ultramem_megatron.errors import UltraMemError
    from ultramem_megatron.megatron.flags.missing_packages import refuse_missing_packages
    from ultramem_megatron.megatron.flags.parse import args_from_flags
    from ultramem_megatron.megatron.flags.slips import refuse_slips_of_training

    # For find_spec a module that is None is not installed.
    sys.modules["emerging_optimizers"] = None
    messages = {}
    for name, flags in flag_sets.items():
        try:
            args = args_from_flags(flags)
            refuse_slips_of_training(args)
            refuse_missing_packages(args)
        except UltraMemError as error:
            messages[name] = str(error)
    return messages


@pytest.fixture(scope="module")
def messages():
    """All in one process."""
    flags = {name: tiny_gpt(**changes) for name, (changes, _) in _SLIPS.items()}
    return run_on_ranks(1, _messages, {**flags, "right": tiny_gpt()})[0]


@pytest.mark.parametrize("name", _SLIPS)
def test_a_slip_is_one_line_that_names_it(name, messages):
    assert _SLIPS[name][1] in messages[name]
    assert "\n" not in messages[name]


def test_right_flags_pass(messages):
    assert "right" not in messages
    assert sorted(messages) == sorted(_SLIPS)


def _training(changes):
    from ultramem_megatron.training.pretrain import main

    try:
        main(tiny_gpt(**changes))
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": None, "min_lr": None}, "There is no learning rate. Give --lr."),
        ({"train_iters": None}, "How long to train is not given. Use --train-iters or --train-s"),
        ({"mock_data": None}, "there is no data. Give --data-path, --train-data-path or --mock-d"),
        ({"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size 0: must be a whole"),
    ],
)
def test_training_refuses_them(changes, message):
    assert message in run_on_ranks(1, _training, changes)[0]
