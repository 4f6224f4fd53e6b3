"""The decode benchmark: what it counts, what it writes, what it draws."""

import csv

import pytest
import torch

from launch.benchmarks.decode_figures import draw
from tests.ranks import run_on_ranks
from ultramem_megatron.errors import UltraMemError


def _benchmark(folder):
    from launch.benchmarks.decode import main

    main(
        [
            "--out",
            str(folder),
            "--scale",
            "small",
            "--group-query-attention",
            "--num-query-groups",
            "2",
        ]
    )


def _shuffled_addresses(model):
    """A list that forward passes of the model add to."""
    from ultramem_megatron.memory.tables.value_table import value_tables

    addresses = []
    for table in value_tables(model).values():
        table.register_forward_hook(lambda _, inputs, __: addresses.append(inputs[0]))
    return addresses


def _routed_experts(model):
    """A list to which forward passes add, for each MoE layer, how many experts have a token."""
    used = []
    for name, module in model.named_modules():
        if name.endswith(".router"):
            module.register_forward_hook(lambda _, __, out: used.append(int(out[1].any(0).sum())))
    return used


def _counts():
    """Bytes counted in one step, and what must have been read, found out another way."""
    from launch.benchmarks.decode_models import SCALES
    from launch.benchmarks.decode_step import DecodeStep
    from launch.benchmarks.weight_access import count_weight_bytes, read_sizes
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.tools.plan.sizes import weight_bytes_read

    found = {}
    for model in SCALES["small"].trio:
        built, _ = untrained_model(model.flags)
        addresses, experts = _shuffled_addresses(built), _routed_experts(built)
        step = DecodeStep(built, [8] * 3, 512)
        with torch.no_grad(), count_weight_bytes(built) as counted:
            step()
        rows = {int(z) % (128 * 128) for out in addresses for z in out.flatten()}
        layers = range(4)
        zero = ["mlp.linear_fc1", "mlp.linear_fc2"] if model.kind != "moe" else []
        parameters = dict(built.named_parameters())
        mlp = sum(
            parameters[f"decoder.layers.{layer}.{name}.weight"].nbytes
            for layer in layers
            for name in zero
        )
        found[model.kind] = (
            counted,
            mlp,
            len(rows),
            experts,
            [weight_bytes_read(read_sizes(built, 2, 16), batch, 4) for batch in (1, 10**6)],
        )
    return found


def _shared_experts():
    """Bytes counted of a model whose MoE layers have an expert for all tokens, and as modelled."""
    from launch.benchmarks.decode_models import SCALES
    from launch.benchmarks.decode_step import DecodeStep
    from launch.benchmarks.weight_access import count_weight_bytes, other_weight_bytes, read_sizes
    from ultramem_megatron.inference.untrained import untrained_model

    _, moe, _ = SCALES["small"].trio
    built, _ = untrained_model([*moe.flags, "--moe-shared-expert-intermediate-size", "24"])
    step = DecodeStep(built, [8] * 3, 512)
    with torch.no_grad(), count_weight_bytes(built) as counted:
        step()
    everything = sum(parameter.nbytes for parameter in built.parameters())
    embedding = built.embedding.word_embeddings.weight.nbytes
    routed = sum(p.nbytes for n, p in built.named_parameters() if ".experts." in n)
    left = everything - embedding - routed - other_weight_bytes(built)
    return counted["mlp"], read_sizes(built, 2, 0).mlp, left


@pytest.fixture(scope="module")
def counts():
    return run_on_ranks(1, _counts)[0]


def test_weights_read_are_counted(counts):
    dense, moe, ultramem = counts["dense"][0], counts["moe"][0], counts["ultramem"][0]
    assert dense == {"mlp": counts["dense"][1], "experts": 0, "values": 0}
    assert dense["mlp"] == 4 * 2 * 64 * 256 * 4  # layers, matrices, sizes, bytes
    rows = counts["ultramem"][2]
    assert 16 < rows <= 3 * 16
    assert ultramem == {"mlp": dense["mlp"], "experts": 0, "values": rows * 32 * 4}
    expert = 2 * 64 * 136 * 4
    used = counts["moe"][3]
    assert len(used) == 4
    assert all(2 <= count <= 3 * 2 for count in used)
    assert moe == {"mlp": 0, "experts": sum(used) * expert, "values": 0}


def test_experts_that_all_tokens_share_are_read_like_an_mlp():
    """Their class is a subclass of Megatron's MLP; the routed experts' own MLPs do not count."""
    shared = 4 * 2 * 64 * 24  # layers, matrices, sizes
    assert run_on_ranks(1, _shared_experts) == [(4 * shared, shared, 4 * shared)]


def test_the_model_of_weight_access_saturates(counts):
    expert = 2 * 64 * 136 * 4
    assert counts["dense"][4] == [counts["dense"][1]] * 2
    assert counts["moe"][4] == [4 * 2 * expert, 4 * 12 * expert]
    mlp = counts["ultramem"][1]
    assert counts["ultramem"][4] == [mlp + 16 * 32 * 4, mlp + 128 * 128 * 32 * 4]


def test_the_command_writes_rows_and_figures(tmp_path):
    run_on_ranks(1, _benchmark, tmp_path)
    with (tmp_path / "decode.csv").open() as file:
        rows = list(csv.DictReader(file))
    over_batches = ["dense", "moe", "moe-grouped", "ultramem"]
    fewer = ["moe", "moe-grouped", "ultramem"]
    assert [row["kind"] for row in rows] == [kind for kind in over_batches for _ in "14"] + fewer
    read = {(row["kind"], row["model"], row["batch"]): row["bytes_all"] for row in rows}
    for kind, model, batch in read:  # the same tokens and experts, whoever multiplies
        if kind == "moe" and batch == "1":
            assert read["moe-grouped", model, batch] == read[kind, model, batch]
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert all(row[name] for name in ("date", "commit", "hardware", "torch", "megatron_core"))
        assert int(row["bytes_counted"]) <= int(row["bytes_modelled"])
        # Attention with 2 of 4 key heads, norms, output layer; a cache of 8 tokens and the new one.
        attention = 4 * (64 * (64 + 2 * 32) + 64 * 64) * 2
        cache = 4 * 2 * 9 * int(row["batch"]) * 2 * 16 * 2
        beside = int(row["bytes_all"]) - int(row["bytes_counted"]) - attention - cache
        head_and_norms = 512 * 64 * 2 + (4 * 2 + 1) * 2 * 64 * 2
        if row["kind"] == "dense":
            assert beside == head_and_norms
        else:  # routers, or projections, keys and cores
            assert head_and_norms < beside < 2 * head_and_norms
        assert row["flags"] == "--group-query-attention --num-query-groups 2"
    parameters = {row["model"]: int(row["parameters"]) for row in rows}
    assert parameters["small moe-2in4"] < parameters["small moe-2in12"]
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "decode_figure1b.png",
        "decode_figure1c.png",
        "decode_figure6c.png",
        "decode_figure7.png",
    }


def test_figures_need_the_benchmarks_csv(tmp_path):
    with pytest.raises(UltraMemError, match=r"none\.csv is not there"):
        draw(tmp_path / "none.csv")
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(UltraMemError, match=r"no rows of this kind\..*ultramem bench decode "):
        draw(other)
