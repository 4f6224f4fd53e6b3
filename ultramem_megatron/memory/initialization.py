"""Initial values: the paper's (appendix A), calibrated to mean score 1, and the authors' code's.

Every tensor is drawn from a generator of its own, seeded by (seed, layer, name, block of rows), so
that the result depends neither on what else was drawn nor on how a table is cut over ranks.
"""

import hashlib
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ultramem_megatron.memory.retrieval.addresses import GridShuffle

if TYPE_CHECKING:
    from ultramem_megatron.memory.layer import UltraMemLayer
    from ultramem_megatron.memory.tables.value_table import ValueTable

ROWS_PER_BLOCK = 4096
CALIBRATION_TOKENS = 256


def generator_for(device: torch.device, *key: object) -> torch.Generator:
    """A generator on `device` whose seed is a hash of the key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


@torch.no_grad()
def reset_parameters(layer: "UltraMemLayer", *, num_layers: int) -> None:
    """Initialise a layer of a model with `num_layers` transformer layers."""
    key = (layer.config.seed, layer.layer_number)
    (_reset_as_paper if layer.config.init == "paper" else _reset_as_official)(
        layer, num_layers, key
    )
    if layer.query.conv is not None:
        layer.query.conv.weight.zero_()
        layer.query.conv.weight[:, -1] = 1  # identity: inert at the start
    if isinstance(layer.shuffle, GridShuffle):
        layer.shuffle.reset(generator_for(torch.device("cpu"), *key, "shuffle"))
    layer.update_filter()
    if layer.config.init == "paper" and not layer.config.softmax:
        calibrate(layer, generator_for(layer.values.weight.device, *key, "calibration"))


def value_std(config_m: int, heads: int, expansion: int, num_layers: int) -> float:
    """sqrt(E / (2 m H L)): output variance 1/(2L) when scores average 1 (appendix A)."""
    return math.sqrt(expansion / (2 * config_m * heads * num_layers))


def _reset_as_paper(layer: "UltraMemLayer", num_layers: int, key: tuple[int, int]) -> None:
    config = layer.config
    hidden_size = layer.query.proj.in_features
    _fill_norm(layer.query.norm, 1.0)  # calibrated later
    _fill_norm(layer.retrieval.keys.norm, config.key_dim**-0.5)
    _normal(layer.query.proj.weight, hidden_size**-0.5, *key, "query")
    _normal(layer.retrieval.keys.weight, config.key_dim**-0.5, *key, "keys")
    std = value_std(config.topk, config.heads, config.value_expansion, num_layers)
    _normal_table(layer.values, std, *key, "values")
    _reset_value_projection(layer, key)
    if layer.cores is not None:
        # The sum of h independent cores has entries of variance 1.
        _normal(layer.cores.weight, config.cores**-0.5, *key, "cores")


def _reset_as_official(layer: "UltraMemLayer", _num_layers: int, key: tuple[int, int]) -> None:
    key_dim = layer.config.key_dim
    _fill_norm(layer.query.norm, key_dim**-0.33)
    _fill_norm(layer.retrieval.keys.norm, key_dim**-0.33)
    _normal(layer.query.proj.weight, key_dim**-0.5, *key, "query")
    _normal(layer.retrieval.keys.weight, key_dim**-0.5, *key, "keys")
    _normal_table(layer.values, 0.02, *key, "values")
    _reset_value_projection(layer, key)
    if layer.cores is not None:
        weight = layer.cores.weight
        weight.copy_(
            torch.rand(
                weight.shape,
                generator=generator_for(weight.device, *key, "cores"),
                device=weight.device,
                dtype=torch.float32,
            )
        )


def _reset_value_projection(layer: "UltraMemLayer", key: tuple[int, int]) -> None:
    if isinstance(layer.value_proj, nn.Linear):
        fan_in = layer.value_proj.in_features  # E * Dv
        _normal(layer.value_proj.weight, fan_in**-0.5, *key, "value_proj")


def _fill_norm(norm: nn.Module, gain: float) -> None:
    weight = getattr(norm, "weight", None)
    if weight is not None:
        weight.fill_(gain)


def _normal(tensor: Tensor, std: float, *key: object) -> None:
    drawn = torch.randn(
        tensor.shape,
        generator=generator_for(tensor.device, *key),
        device=tensor.device,
        dtype=torch.float32,
    )
    tensor.copy_(drawn * std)


def _normal_table(table: "ValueTable", std: float, *key: object) -> None:
    layout = table.layout
    normal_part(table.weight, layout.rows(), layout.columns(), layout.value_dim, std, *key)


def normal_part(
    part: Tensor, rows: range, columns: range, width: int, std: float, *key: object
) -> None:
    """Fill `part` with these rows and columns of a table that is drawn block of rows by block.

    part: (len(rows), len(columns)). width: columns of the whole table. Never more than a block of
    whole rows is held, and every part comes out as the whole table would have it.
    """
    for block in range(rows.start // ROWS_PER_BLOCK, -(-rows.stop // ROWS_PER_BLOCK)):
        start = block * ROWS_PER_BLOCK
        drawn = torch.randn(
            ROWS_PER_BLOCK,
            width,
            device=part.device,
            dtype=torch.float32,
            generator=generator_for(part.device, *key, block),
        )
        low, high = max(start, rows.start), min(start + ROWS_PER_BLOCK, rows.stop)
        piece = drawn[low - start : high - start, columns.start : columns.stop]
        part[low - rows.start : high - rows.start] = piece * std


@torch.no_grad()
def calibrate(layer: "UltraMemLayer", generator: torch.Generator) -> float:
    """Scale the queries once so that the weights of the values average 1; returns the mean before.

    Inputs are drawn as a norm leaves them, with unit variance; the top-m scores of the real keys
    and cores are averaged over tokens, picks and cores. TDQKR scores grow with the square of the
    query's gain, product-key scores with the gain itself.
    """
    weight = layer.query.proj.weight
    drawn = torch.randn(
        CALIBRATION_TOKENS, 1, weight.shape[1], generator=generator, device=weight.device,
        dtype=torch.float32,
    )  # fmt: skip
    scores = layer.retrieval(layer.query(drawn.to(weight.dtype))).scores
    mean = float(scores.mean())
    if not mean > 0:
        return mean
    power = 0.5 if layer.cores is not None else 1.0
    gain = getattr(layer.query.norm, "weight", None)
    (weight if gain is None else gain).mul_(mean**-power)
    return mean
