"""Presets: their flags as a shell gets them, and their sources as a reader gets them."""

import shlex

import pytest

from tests.ranks import run_on_ranks
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.size import memory_size
from ultramem_megatron.memory.spans import parse_spans
from ultramem_megatron.memory.validation import validate
from ultramem_megatron.presets import PRESETS, preset_fields
from ultramem_megatron.presets.__main__ import main
from ultramem_megatron.presets.flags import as_words, flags
from ultramem_megatron.presets.preset import Source


def _printed(capsys, *argv):
    main(argv)
    return capsys.readouterr().out


def test_settings_become_flags():
    values = {"num_layers": 12, "lr": 6e-4, "swiglu": True, "bias": False, "min-lr": 0}
    assert as_words(values) == ["--num-layers", "12", "--lr", "0.0006", "--swiglu", "--min-lr", "0"]


def test_model_and_training_are_one_line_for_a_shell(capsys):
    printed = _printed(capsys, "ultramem-151m-x12", "--model", "--training")
    assert printed.count("\n") == 1
    words = shlex.split(printed)
    assert words == flags("ultramem-151m-x12", model=True, training=True)
    found = {word: words[i + 1] for i, word in enumerate(words[:-1])}
    assert found["--hidden-size"] == "1024"
    assert found["--ultramem-preset"] == "ultramem-151m-x12"
    # Table 4 of the paper.
    assert (found["--lr"], found["--min-lr"]) == ("0.0006", "6e-05")
    assert (found["--train-iters"], found["--global-batch-size"]) == ("238418", "2048")


def test_models_without_memory_print_megatrons_flags_only():
    words = flags("moe-1.6b-2in34", model=True, training=False)
    assert words[words.index("--num-experts") + 1] == "34"
    assert "--lr" not in words
    for name in ("moe-1.6b-2in34", "dense-6.5b"):
        assert not [word for word in flags(name, model=True, training=True) if "ultramem" in word]


@pytest.mark.parametrize("size", ["151m", "680m", "1.6b"])
def test_compared_models_share_transformer_and_training(size):
    dense, *others = (p for name, p in PRESETS.items() if f"-{size}" in name)
    assert len(others) >= 2
    for other in others:
        assert other.training == dense.training
        assert dense.model.items() <= other.model.items()


def test_learning_rates_are_those_of_table_4():
    rates = {name: PRESETS[name].training["lr"].value for name in PRESETS if "dense" in name}
    assert rates == {
        "dense-151m": 6e-4,
        "dense-680m": 2.5e-4,
        "dense-1.6b": 2e-4,
        "dense-6.5b": 1.2e-4,
    }


def test_an_explanation_names_every_setting_and_its_source(capsys):
    printed = _printed(capsys, "ultramem-1.6b-x12")
    assert "inferred  --ultramem-num-keys 1789" in printed
    assert "paper     --ultramem-spans 3:7/8:12/" in printed
    assert "paper     --no-ultramem-softmax" in printed
    assert "assumed   --num-attention-heads 16" in printed
    preset = PRESETS["ultramem-1.6b-x12"]
    for name in (*preset.model, *preset.memory, *preset.training):
        assert name.replace("_", "-") in printed
    for source in Source:
        assert f"\n{source} " in printed


def test_names_are_listed_and_wrong_ones_refused(capsys):
    assert len(_printed(capsys).splitlines()) == len(PRESETS)
    with pytest.raises(UltraMemError, match=r"'ultramem' is unknown\. Known presets: dense-151m, "):
        main(["ultramem"])


@pytest.mark.parametrize(
    ("name", "hidden_size", "layers", "sparse"),
    [("ultramemv2-227m-1.2b", 768, 20, 0.995e9), ("ultramemv2-1b-7b", 2048, 16, 5.138e9)],
)
def test_tables_of_ultramem_v2_are_those_of_its_papers_table_10(name, hidden_size, layers, sparse):
    fields = preset_fields(name)
    config = UltraMemConfig(**fields | {"spans": parse_spans(fields["spans"], layers)})
    validate(config, hidden_size=hidden_size, num_layers=layers)
    assert memory_size(config, hidden_size).sparse == pytest.approx(sparse, rel=1e-3)


def _counted(names):
    from ultramem_megatron.tools.plan.sizes import preset_sizes

    found = (preset_sizes(name) for name in names)
    return [[round(n / 1e6, 1) for n in (s.activated, s.total, s.embedding)] for s in found]


@pytest.mark.long
def test_what_plan_counts_of_the_familys_models():
    """Millions of parameters; what the papers have stands in presets/README.md."""
    expected = {
        "olmoe-227m-1.2b": [188.7, 1179.6, 38.6],
        "olmoe-1b-7b": [1073.7, 6710.9, 206.0],
        "ultramemv2-227m-1.2b": [197.6, 1192.7, 38.6],
        "ultramemv2-1b-7b": [963.9, 6100.1, 206.0],
        "memory-plus-373m-1024k": [301.6, 1374.9, 103.0],
        "memory-plus-151m-x12": [172.2, 2029.8, 103.0],
        "peer-151m-x12": [155.3, 2015.1, 103.0],
    }
    found = run_on_ranks(1, _counted, list(expected))[0]
    assert dict(zip(expected, found, strict=True)) == expected
