"""From flags to a configuration, and every wrong flag to its one message."""

from argparse import ArgumentParser, Namespace

import pytest

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.flags.arguments import add_ultramem_arguments, config_from_args
from ultramem_megatron.memory.size import memory_size
from ultramem_megatron.memory.spans import Span
from ultramem_megatron.presets import MEMORY_PRESETS, PRESETS


def _args(text, num_layers=12, hidden_size=64):
    parser = add_ultramem_arguments(ArgumentParser())
    args = parser.parse_args(text.split())
    return Namespace(**vars(args), num_layers=num_layers, hidden_size=hidden_size, seed=5)


def _config(text, **sizes):
    return config_from_args(_args(text, **sizes))


def test_no_flags_is_a_plain_gpt():
    assert _config("") is None
    assert config_from_args(Namespace(num_layers=2, hidden_size=8, seed=1)) is None


def test_defaults_are_the_papers():
    config = _config("--ultramem-spans 3:5 --ultramem-num-keys 100")
    assert config.spans == (Span(3, 5),)
    assert (config.num_keys, config.topk, config.heads) == (100, 42, 2)
    assert (config.tucker_rank, config.cores, config.value_expansion) == (2, 2, 4)
    assert (config.key_dim, config.value_dim) == (32, 32)
    assert (config.aux_loss_weight, config.aux_loss_margin) == (0.001, 0.15)
    assert (config.value_lr_mult, config.value_lr_decay) == (4.0, 1.0)
    assert config.seed == 5


def test_every_flag_reaches_its_field():
    config = _config(
        "--ultramem-spans full --ultramem-num-keys 9 --ultramem-key-dim 12 --ultramem-value-dim 18 "
        "--ultramem-topk 4 --ultramem-heads 3 --ultramem-tucker-rank 3 --ultramem-rank-layout full "
        "--ultramem-cores 3 --ultramem-value-expansion 9 --ultramem-init official "
        "--ultramem-aux-loss-weight 0.5 --ultramem-aux-loss-margin 0.25 "
        "--ultramem-value-lr-mult 3 --ultramem-value-lr-decay 0.5 --ultramem-query-conv-kernel 6 "
        "--no-ultramem-share-query --ultramem-softmax --ultramem-qk-norm rmsnorm",
        num_layers=2,
    )
    assert config.spans == (Span(1, 1), Span(2, 2))
    assert (config.key_dim, config.value_dim, config.topk, config.heads) == (12, 18, 4, 3)
    assert (config.rank_layout, config.init, config.qk_norm) == ("full", "official", "rmsnorm")
    assert (config.aux_loss_weight, config.aux_loss_margin) == (0.5, 0.25)
    assert (config.value_lr_mult, config.value_lr_decay) == (3, 0.5)
    assert (config.query_conv_kernel, config.share_query, config.softmax) == (6, False, True)


def test_a_preset_fills_what_is_not_given():
    config = _config(
        "--ultramem-preset ultramem-1.6b-x12 --ultramem-topk 7 --no-ultramem-share-query",
        num_layers=32,
        hidden_size=2048,
    )
    assert len(config.spans) == 6
    assert config.spans[-1] == Span(28, 32)
    assert (config.num_keys, config.value_dim, config.query_conv_kernel) == (1789, 1024, 5)
    assert (config.topk, config.share_query) == (7, False)


@pytest.mark.parametrize("name", MEMORY_PRESETS)
def test_every_preset_is_valid_for_its_transformer(name):
    model = PRESETS[name].model
    layers, hidden = model["num_layers"].value, model["hidden_size"].value
    assert _config(f"--ultramem-preset {name}", num_layers=layers, hidden_size=hidden)


@pytest.mark.parametrize(
    ("preset", "dense_millions", "sparse_billions", "mflops"),
    [
        # Table 2 of the paper; the transformer around has 12 * 12 * 1024^2 parameters.
        ("pkm-151m-x10", 173.01, 1.534, 346.06),
        ("ablation-151m-x10-no-softmax", 173.01, 1.534, 346.06),
        ("ablation-151m-x10-half-value-dim", 178.47, 1.529, 356.98),
        ("ablation-151m-x10-share-query", 173.46, 1.529, 346.96),
        ("ablation-151m-x10-split-skip", 161.64, 1.536, None),
        ("ablation-151m-x10-qk-norm", 161.64, 1.536, 323.54),
        ("ablation-151m-x10-ive", 172.37, 1.536, 344.98),
        ("ablation-151m-x10-tdqkr", 172.37, 1.536, 344.98),
        ("ablation-151m-x10-mcs", 172.37, 1.536, 344.98),
        ("ablation-151m-x10-query-conv", 172.38, 1.536, None),
    ],
)
def test_sizes_of_the_ablation_rows_are_the_papers(preset, dense_millions, sparse_billions, mflops):
    config = _config(f"--ultramem-preset {preset}", num_layers=12, hidden_size=1024)
    size = memory_size(config, 1024)
    transformer = 12 * 12 * 1024**2
    assert (transformer + size.dense) / 1e6 == pytest.approx(dense_millions, abs=0.011)
    assert size.sparse / 1e9 == pytest.approx(sparse_billions, abs=6e-4)
    if mflops is not None:
        # The first rows of the table seem to count the values read by one head only (0.04 less).
        flops = 2 * transformer + size.flops_per_token
        assert flops / 1e6 == pytest.approx(mflops, abs=0.05)


_BASE = "--ultramem-spans 3:5 --ultramem-num-keys 10 "


def test_a_rate_that_follows_the_schedule_beats_a_presets_fixed_one():
    sizes = {"num_layers": 24, "hidden_size": 1024}
    preset = "--ultramem-preset memory-plus-373m-1024k"
    assert _config(preset, **sizes).value_lr_fixed == 1e-3
    assert _config(f"{preset} --ultramem-value-lr-fixed 2e-3", **sizes).value_lr_fixed == 2e-3
    changed = _config(f"{preset} --ultramem-value-lr-mult 3", **sizes)
    assert (changed.value_lr_fixed, changed.value_lr_mult) == (0, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            _BASE + "--ultramem-value-lr-fixed 1e-3 --ultramem-value-lr-mult 2",
            "--ultramem-value-lr-fixed 0.001 and --ultramem-value-lr-mult 2 are both given",
        ),
        ("--ultramem-topk 3", r"--ultramem-topk given, but no memory layer is placed"),
        ("--ultramem-overlap", r"--ultramem-overlap given, but no memory layer is placed"),
        ("--ultramem-spans 3:5", r"--ultramem-num-keys is not given"),
        ("--ultramem-preset big", r"--ultramem-preset 'big' is unknown. Known presets: .*pkm-151m"),
        ("--ultramem-spans 3:13 --ultramem-num-keys 9", r"span 3:13 leaves the model"),
        ("--ultramem-preset dense-151m", r"'dense-151m' has no memory layers. Known presets"),
        (_BASE + "--ultramem-value-expansion 8", r"is 8; it must be a square .*Use 4 or 9"),
        (_BASE + "--ultramem-value-expansion 0", r"--ultramem-value-expansion is 0"),
        (_BASE + "--ultramem-value-expansion -4", r"--ultramem-value-expansion is -4"),
        (_BASE, r"--ultramem-topk is 42, more than the 20 keys of a side"),
        (_BASE + "--ultramem-topk 0", r"--ultramem-topk is 0; it must be a whole number >= 1"),
        (_BASE + "--ultramem-topk 4 --ultramem-heads 3", r"--ultramem-heads is 3; .*Use 4"),
        (_BASE + "--ultramem-topk 4 --ultramem-cores 3", r"32, not divisible by .*cores 3"),
        (_BASE + "--ultramem-topk 4 --ultramem-tucker-rank 3", r"32, not divisible by .*rank 3"),
        (_BASE + "--ultramem-topk 4 --ultramem-retrieval pkm --ultramem-cores 2", r"Tucker cores"),
        (_BASE + "--ultramem-topk 4 --no-ultramem-value-projection", r"expansion is 4; without"),
        (
            _BASE + "--ultramem-topk 4 --no-ultramem-value-projection --ultramem-value-expansion 1",
            r"-value-dim is 32; without the value projection it must be the hidden size \(64\)",
        ),
        (_BASE + "--ultramem-topk 4 --ultramem-aux-loss-weight -1", r"-aux-loss-weight is -1.0"),
        (_BASE + "--ultramem-topk 4 --ultramem-aux-loss-margin nan", r"-aux-loss-margin is nan"),
        (_BASE + "--ultramem-topk 4 --ultramem-value-lr-mult 0", r"-value-lr-mult is 0.0"),
        (_BASE + "--ultramem-topk 4 --ultramem-value-lr-decay 1.5", r"-value-lr-decay is 1.5"),
        (_BASE + "--ultramem-topk 4 --ultramem-value-lr-decay 0", r"-value-lr-decay is 0.0"),
        (_BASE + "--ultramem-topk 4 --ultramem-query-conv-kernel -1", r"-query-conv-kernel is -1"),
        ("--ultramem-spans 3:5 --ultramem-num-keys 50000", r"rows are numbered in 32 bits"),
    ],
)
def test_wrong_flags_are_refused_with_what_to_do(flags, message):
    with pytest.raises(UltraMemError, match=message):
        _config(flags)


@pytest.mark.parametrize(
    "flag",
    [
        "--ultramem-init zeros",
        "--ultramem-topk many",
        "--ultramem-topk 1_0",
        "--ultramem-topk +4",
        "--ultramem-topk \u0664",
        f"--ultramem-num-keys {'9' * 5000}",
    ],
)
def test_what_argparse_refuses_names_the_flag(flag, capsys):
    with pytest.raises(SystemExit):
        _args(flag)
    assert flag.split()[0] in capsys.readouterr().err
