"""Initial values: scale, calibration, and independence of everything that must not matter."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.layers import VARIANTS, small_config, small_layer
from ultramem_megatron.memory.initialization.draws import (
    COLUMNS_PER_BLOCK,
    ROWS_PER_BLOCK,
    normal_part,
)
from ultramem_megatron.memory.initialization.feed_forward import default_std, mlp_std
from ultramem_megatron.memory.initialization.paper import output_std
from ultramem_megatron.memory.initialization.read_std import value_std
from ultramem_megatron.memory.layer import UltraMemLayer


def _layer(hidden_size=64, num_layers=12, layer_number=1, **changes):
    sizes = {"num_keys": 40, "key_dim": 32, "value_dim": 32, "topk": 16}
    config = small_config(**{**sizes, **changes})
    return UltraMemLayer(
        config, hidden_size=hidden_size, num_layers=num_layers, layer_number=layer_number
    )


@pytest.mark.parametrize(
    ("topk", "heads", "expansion", "layers", "expected"),
    [(42, 2, 4, 12, 0.0445), (42, 2, 4, 24, 0.0315), (42, 2, 4, 32, 0.0273)],
)
def test_value_std_of_the_papers_models(topk, heads, expansion, layers, expected):
    config = small_config(topk=topk, heads=heads, value_expansion=expansion)
    assert value_std(config, output_std(2 * layers)) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tucker_rank": 4},
        {"cores": 4},
        {"heads": 1},
        {"rank_layout": "full"},
        {"qk_norm": "rmsnorm"},
        {"qk_norm": "none"},
        {"retrieval": "pkm", "tucker_rank": 1, "cores": 1},
        {"tucker_rank": 1, "cores": 1},
    ],
)
@pytest.mark.parametrize("init", ["matched", "paper"])
def test_calibration_makes_the_mean_square_of_scores_one(init, changes):
    layer = _layer(init=init, **changes)
    # Other queries than it was set with; squares have a long tail where nothing is normed.
    square = layer.calibrate(torch.Generator().manual_seed(99))
    assert square == pytest.approx(1, rel=0.2)
    again = layer.calibrate(torch.Generator().manual_seed(99))
    assert again == pytest.approx(1, rel=1e-4)


_SHAPES = [
    *({"cores": cores} for cores in (1, 2, 4, 8)),
    *({"tucker_rank": rank, "key_dim": 24} for rank in (1, 3, 4)),
    *({"value_expansion": expansion} for expansion in (1, 9)),
    {"value_dim": 8, "cores": 1},
    {"hidden_size": 192},
    {"softmax": True},
    {"retrieval": "pkm", "tucker_rank": 1, "cores": 1},
    {"value_projection": False, "value_expansion": 1, "value_dim": 64},
    {"qk_norm": "none", "heads": 1},
    {"values": "prevalued", "pre_value_dim": 24},
    {"values": "prevalued", "pre_value_activation": "gelu", "value_expansion": 1},
    {"values": "gated", "projection_bias": True},
]


@pytest.mark.parametrize("changes", _SHAPES, ids=str)
@pytest.mark.parametrize("init", ["matched", "paper"])
def test_output_std_is_its_target(init, changes):
    """Over tokens, features and memories: with few values a single memory's is off by its draw."""
    hidden_size = changes.get("hidden_size", 64)
    x = torch.randn(300, hidden_size)
    options = {"num_layers": 12, "hidden_size": hidden_size, "feed_forward_std": 0.03}
    sizes = {"num_keys": 40, "key_dim": 32, "value_dim": 32, "topk": 16, **changes}
    sizes.pop("hidden_size", None)
    outs = [
        UltraMemLayer(small_config(init=init, **sizes), layer_number=number, **options)(x)
        for number in range(6)
    ]
    expected = 0.03 if init == "matched" else 24**-0.5
    assert torch.stack(outs).std().item() == pytest.approx(expected, rel=0.1)


def test_slices_of_a_value_weigh_the_same():
    """With cores of both signs, the paper's, one of two may have eight times the other's weight."""
    layer = _layer(num_keys=60, cores=8)
    scores = layer.retrieve(layer.query(torch.randn(500, 64))).scores.detach()
    assert (scores < 0).float().mean() < 0.02
    weights = scores.mean((0, 1))
    assert weights.max() < 2 * weights.min()


def test_official_scores_do_not_depend_on_the_layout_of_ranks():
    def mean(layout):
        layers = [
            _layer(init="official", rank_layout=layout, tucker_rank=rank, key_dim=36, num_keys=60)
            for rank in (2, 3)
        ]
        x = torch.randn(500, 64)
        scores = [layer.retrieve(layer.query(x)).scores for layer in layers]
        return torch.stack([of_layer.detach().mean() for of_layer in scores])

    # Summed over half or a third as many terms, the best scores stand out a little differently.
    assert torch.allclose(mean("split"), mean("full"), rtol=0.15)


def test_pkm_initialisation_is_that_of_product_key_memories():
    layer = _layer(init="pkm", retrieval="pkm", tucker_rank=1, cores=1, qk_norm="layernorm")
    reach = 32**-0.5
    keys = layer.retrieval.keys.weight
    assert keys.abs().max().item() == pytest.approx(reach, rel=1e-3)
    assert keys.std().item() == pytest.approx(reach / 3**0.5, rel=0.02)
    query = layer.query.proj.weight
    assert query.abs().max().item() == pytest.approx((6 / (64 + 64)) ** 0.5, rel=1e-2)
    assert layer.values.weight.std().item() == pytest.approx(32**-0.5, rel=0.02)
    assert layer.query.norm.weight.unique().tolist() == [1]
    assert layer.retrieval.keys.norm.weight.unique().item() == pytest.approx(96**-0.5)


def test_scores_keep_their_size_from_row_to_row_of_the_papers_table():
    """Product keys, with norms, with Tucker cores, with two of them: none gains by its scale."""
    additive = {"retrieval": "pkm", "tucker_rank": 1, "cores": 1}
    rows = (
        {**additive, "qk_norm": "none"},
        {**additive, "qk_norm": "layernorm"},
        {"tucker_rank": 2, "cores": 1},
        {"tucker_rank": 3, "cores": 1, "key_dim": 36},
        {"tucker_rank": 2, "cores": 2},
    )
    x = torch.randn(500, 64)
    squares = []
    for changes in rows:
        layer = _layer(init="pkm", num_keys=60, **changes)
        squares.append(layer.retrieve(layer.query(x)).scores.detach().square().mean().item())
    assert squares == pytest.approx([squares[1]] * len(rows), rel=0.2)


def test_at_the_papers_largest_size_matched_is_the_papers_rule():
    """Its own figures: an MLP 4 D wide with weights of 0.02 at D 2048, 32 layers."""
    assert default_std(2048, 64) == pytest.approx(0.132, abs=5e-4)
    assert default_std(2048, 64) == pytest.approx(output_std(64), rel=0.1)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", [F.gelu, F.silu, F.relu])
def test_the_integral_is_what_a_built_mlp_gives(activation, gated):
    inner, first, second = 256, 0.05, 0.02
    x = torch.randn(4000, 64)
    hidden = activation(x @ torch.randn(64, inner) * first)
    if gated:
        hidden = hidden * (x @ torch.randn(64, inner) * first + 0.5)
    out = hidden @ torch.randn(inner, 64) * second
    std = mlp_std(
        64,
        inner,
        first_std=first,
        second_std=second,
        activation=activation,
        gated=gated,
        gate_offset=0.5,
    )
    assert std == pytest.approx(out.std().item(), rel=0.1)


def test_official_initialisation_is_the_authors():
    layer = _layer(init="official", key_dim=32, qk_norm="rmsnorm", rank_layout="full")
    assert layer.query.norm.weight.unique().tolist() == pytest.approx([32**-0.33])
    assert layer.retrieval.keys.norm.weight.unique().tolist() == pytest.approx([32**-0.33])
    stds = {
        layer.query.proj.weight: 32**-0.5,
        layer.retrieval.keys.weight: 32**-0.5,
        layer.values.weight: 0.02,
        layer.value_proj.weight: (4 * 32) ** -0.5,
    }
    for weight, std in stds.items():
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert abs(weight.mean().item()) < 0.05 * std * math.sqrt(400)
    assert layer.retrieval.cores.weight.min() >= 0
    assert layer.retrieval.cores.weight.max() <= 1


def test_paper_initialisation_is_that_of_appendix_a():
    layer = _layer(init="paper", num_layers=8, heads=2, topk=9, value_expansion=4, cores=2)
    stds = {
        layer.query.proj.weight: 64**-0.5,
        layer.retrieval.keys.weight: 32**-0.5,
        layer.retrieval.cores.weight: 2**-0.5,
        layer.values.weight: (4 / (2 * 9 * 2 * 8)) ** 0.5,
        layer.value_proj.weight: (4 * 32) ** -0.5,
    }
    for weight, std in stds.items():
        # A standard deviation of n numbers is off by std / sqrt(2 n), and rarely by four times it.
        assert weight.std().item() == pytest.approx(std, rel=4 * (2 * weight.numel()) ** -0.5)
    assert layer.retrieval.keys.norm.weight.unique().tolist() == pytest.approx([32**-0.5])


def test_under_a_softmax_queries_are_left_as_they_are():
    """Its weights add up to one, whatever the scale of the scores."""
    assert _layer(softmax=True).query.norm.weight.unique().tolist() == [1]
    (gain,) = _layer().query.norm.weight.unique().tolist()
    assert gain != 1


def test_summed_cores_have_unit_variance():
    layer = _layer(init="paper", tucker_rank=8, cores=4, heads=8)
    assert layer.retrieval.cores.total().std().item() == pytest.approx(1, rel=0.15)


def test_convolution_starts_as_the_identity():
    with_conv, without = _layer(query_conv_kernel=5), _layer()
    x = torch.randn(7, 2, 64)
    assert torch.equal(with_conv(x), without(x))


def test_values_depend_on_seed_and_layer_and_on_nothing_else():
    def table(**changes):
        number = changes.pop("layer_number", 1)
        return _layer(layer_number=number, **changes).values.weight.detach()

    torch.manual_seed(1)
    first = table()
    torch.manual_seed(2)
    assert torch.equal(table(), first)
    assert torch.equal(table(cores=1, query_conv_kernel=3, topk=16), first)
    assert not torch.equal(table(seed=4), first)
    assert not torch.equal(table(layer_number=2), first)


def test_construction_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    _layer()
    assert torch.equal(torch.rand(3), expected)


def test_every_part_is_a_piece_of_the_whole_table():
    total, width = ROWS_PER_BLOCK + 900, 2 * COLUMNS_PER_BLOCK + 6
    whole = torch.empty(total, width)
    normal_part(whole, range(total), range(width), width, 0.5, "key")
    for rows, columns in (
        (range(10), range(width)),
        (range(ROWS_PER_BLOCK - 5, ROWS_PER_BLOCK + 5), range(2, 4)),
        (range(4000, total), range(5, 6)),
        (range(7), range(COLUMNS_PER_BLOCK - 3, 2 * COLUMNS_PER_BLOCK + 2)),
        (range(total - 2, total), range(COLUMNS_PER_BLOCK, width)),
    ):
        part = torch.empty(len(rows), len(columns))
        normal_part(part, rows, columns, width, 0.5, "key")
        expected = whole[rows.start : rows.stop, columns.start : columns.stop]
        assert torch.equal(part, expected)
    assert whole.std().item() == pytest.approx(0.5, rel=0.02)
    for block in whole.split(COLUMNS_PER_BLOCK, 1)[1:]:
        assert not torch.equal(block, whole[:, : block.shape[1]])


def test_a_part_draws_its_own_blocks_alone(monkeypatch):
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *s, **k: drawn.append(s) or randn(*s, **k))
    part = torch.empty(ROWS_PER_BLOCK, COLUMNS_PER_BLOCK)
    rows, columns = range(ROWS_PER_BLOCK), range(COLUMNS_PER_BLOCK, 2 * COLUMNS_PER_BLOCK)
    normal_part(part, rows, columns, 64 * COLUMNS_PER_BLOCK, 0.5, "key")
    assert drawn == [part.shape]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_initialised(variant, nan_filled_empty):
    layer = small_layer(torch.float32, **VARIANTS[variant])
    for name, tensor in layer.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        if not name.startswith(("shuffle.", "query.common.")) and not name.endswith("bias"):
            assert tensor.abs().sum() > 0, name


def test_meta_device_allocates_nothing():
    with torch.device("meta"):
        layer = _layer()
    assert all(parameter.is_meta for parameter in layer.parameters())
