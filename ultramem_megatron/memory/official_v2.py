"""Exchange with the authors' UltraMemV2 (their UltraMemLayerV2), all memories of a model at once.

Their names, left, with L memories, R = L n^2 rows, W = w^2 of them in a window, and ours:
    full_memory_layer.values_for_look_up, pre_values_for_look_up   (R, Dv), (R, Dp)
                                            values.table.weight, values.pre_table.weight, shared
    mem_blocks.{l}.query_proj.weight        (2 r Dk, D)   query.proj.weight, its first rows
    mem_blocks.{l}.keys                     (H, 2, e w, Dk, r)  retrieval.keys.weight, two swapped
    mem_blocks.{l}.query_norm.*, keys_norm.*     query.norm.*, retrieval.keys.norm.*
    mem_blocks.{l}.tucker_core.{c}          (H, r, r)     retrieval.cores.weight, stacked
    mem_blocks.{l}.tucker_core_u, _v        (1, H, 1, r)  retrieval.cores.u, .t
    mem_blocks.{l}.shuffle_index            (e^2 W,)      shuffle.permutation
    mem_blocks.{l}.pre_values_proj.weight   (Dp, D)       values.pre_proj.weight
    mem_blocks.{l}.values_proj.weight       (D, E Dv)     value_proj.weight

Their code runs with a query for each rank and rank 2 only, and then reads the side for the number
of a pair of heads: in effect heads 0 and 1 share the queries of the first 2 Dk rows, heads 2 and 3
those of the rest, and every rank has the same. So it is loaded. Their windows form a ring.
"""

import math
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.foreign import Entry, ForeignMemories, Sizes, check_shapes
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.modules import build_norm
from ultramem_megatron.memory.official_v1 import norm_kind
from ultramem_megatron.memory.retrieval.addresses import StoredShuffle
from ultramem_megatron.memory.sharing import first_value
from ultramem_megatron.memory.spans import Span
from ultramem_megatron.memory.values import VALUES
from ultramem_megatron.memory.values.contract import Site
from ultramem_megatron.memory.vertical_parallel import TABLES, Given, whole_tables

_WHAT = "UltraMemV2"
_NORMS = {"query_norm": "query.norm", "keys_norm": "retrieval.keys.norm"}


def load_official_v2(state_dict: Given, cfg: Mapping[str, Any]) -> ForeignMemories:
    """The memories of a model of the authors'; dtypes and device are the tensors'.

    state_dict: `full_memory_layer.*` and `mem_blocks.{l}.*`, tensors or numpy arrays; with vertical
    parallelism those of all ranks, a list or by rank (0, "rank_0"); or the folder of a checkpoint.
    cfg: their constructor's sizes, and `norm` ("rms" or "ln"), `layer_norm_eps`,
    `q_for_each_tucker_rank`, `use_glu_act`, `key_expand_time`. Where the stored filter is still
    zero it is computed from the cores. Raises UltraMemError for what their code cannot run.
    """
    sizes = Sizes(cfg, _WHAT)
    state = whole_tables(state_dict, sizes)
    config = _config(state, sizes)
    hidden, eps = sizes.get("hidden_size"), sizes.get("layer_norm_eps")
    names = [_Names(number, state, config) for number in range(len(config.spans))]
    check_shapes(state, dict(_shapes(names, config, sizes)), _WHAT)
    layers, shared = [], None
    for name in names:
        with torch.device("meta"):
            shared = VALUES[config.values].build(config, Site(hidden, shared=shared))
            layer = UltraMemLayer(
                config,
                hidden_size=hidden,
                num_layers=len(names),
                layer_number=name.number + 1,
                eps=eps,
                values=shared,
                table_number=1,
                first_value=first_value(config, name.number),
            )
            layer.query.norm = name.norm("query_norm", eps)
            layer.retrieval.keys.norm = name.norm("keys_norm", eps)
        layer.shuffle = StoredShuffle(state[name.theirs("shuffle_index")])
        layers.append(layer)
    entries: dict[str, Entry] = {}
    ours: dict[str, Tensor] = {}
    for name in names:
        entries |= name.entries()
        ours |= name.ours()
    return ForeignMemories(layers, entries).take(ours)


def to_official_v2(memories: ForeignMemories) -> dict[str, Tensor]:
    """The authors' state dict, detached copies; inverse of `load_official_v2`.

    Tables are whole; `cut_official_v2` cuts them for ranks.
    """
    return memories.authors_state()


class _Names:
    """The entries of one memory, there and back."""

    def __init__(self, number: int, state: Mapping[str, Tensor], config: UltraMemConfig) -> None:
        self.number, self._state, self._config = number, state, config
        self.used = config.num_queries * 2 * config.key_dim
        """Rows of the query projection that anything depends on."""

    def theirs(self, name: str) -> str:
        return f"mem_blocks.{self.number}.{name}"

    def norm(self, name: str, eps: float) -> torch.nn.Module:
        return build_norm(
            self._config.qk_norm,
            self._config.key_dim,
            eps,
            affine=self.theirs(f"{name}.weight") in self._state,
            bias=self.theirs(f"{name}.bias") in self._state,
        )

    def norms(self) -> Iterator[tuple[str, str]]:
        """Their names of norms that are there, and ours."""
        for their, mine in _NORMS.items():
            for part in ("weight", "bias"):
                if self.theirs(f"{their}.{part}") in self._state:
                    yield f"{their}.{part}", f"{mine}.{part}"

    def _tables(self) -> dict[str, str]:
        """Their name of each table, and ours."""
        if self._config.values == "pooled":
            return {TABLES[0]: "values.weight"}
        return {TABLES[0]: "values.table.weight", TABLES[1]: "values.pre_table.weight"}

    def entries(self) -> dict[str, Entry]:
        mine = f"layers.{self.number}."
        query = self._state[self.theirs("query_proj.weight")]
        found = {
            "keys": Entry(f"{mine}retrieval.keys.weight", lambda w: w.transpose(-1, -2)),
            "query_proj.weight": Entry(f"{mine}query.proj.weight", unused=query[self.used :]),
            "values_proj.weight": Entry(f"{mine}value_proj.weight"),
            "shuffle_index": Entry(f"{mine}shuffle.permutation", lambda p: p.long()),
            "tucker_core_u": Entry(f"{mine}retrieval.cores.u", lambda u: u[None, :, None]),
            "tucker_core_v": Entry(f"{mine}retrieval.cores.t", lambda t: t[None, :, None]),
        }
        for core in range(self._config.cores):
            found[f"tucker_core.{core}"] = Entry(f"{mine}retrieval.cores.weight", itemgetter(core))
        if self._config.values != "pooled":
            found["pre_values_proj.weight"] = Entry(f"{mine}values.pre_proj.weight")
        found |= {their: Entry(f"{mine}{our}") for their, our in self.norms()}
        named = {self.theirs(name): entry for name, entry in found.items()}
        if self.number == 0:
            named |= {their: Entry(mine + our) for their, our in self._tables().items()}
        return named

    def ours(self) -> dict[str, Tensor]:
        def of(name: str) -> Tensor:
            return self._state[self.theirs(name)]

        cores = [of(f"tucker_core.{core}") for core in range(self._config.cores)]
        found = {
            "retrieval.keys.weight": of("keys").transpose(-1, -2),
            "retrieval.cores.weight": torch.stack(cores),
            "retrieval.cores.u": of("tucker_core_u")[0, :, 0],
            "retrieval.cores.t": of("tucker_core_v")[0, :, 0],
            "shuffle.permutation": of("shuffle_index"),
            "query.proj.weight": of("query_proj.weight")[: self.used],
            "value_proj.weight": of("values_proj.weight"),
        }
        if self._config.values != "pooled":
            found["values.pre_proj.weight"] = of("pre_values_proj.weight")
        found |= {mine: of(their) for their, mine in self.norms()}
        tables = {our: self._state[their] for their, our in self._tables().items()}
        return {f"layers.{self.number}.{name}": x for name, x in (found | tables).items()}


def _config(state: Mapping[str, Tensor], sizes: Sizes) -> UltraMemConfig:
    _refuse_what_does_not_run(sizes)
    knum, memories = sizes.get("knum"), sizes.get("mem_layer_num")
    expansion = sizes.get("key_expand_time")
    return UltraMemConfig(
        spans=tuple(Span(layer, layer) for layer in range(1, memories + 1)),
        num_keys=knum,
        key_dim=sizes.get("kdim"),
        value_dim=sizes.get("vdim"),
        topk=sizes.get("knn"),
        heads=sizes.get("head"),
        share_query=True,
        retrieval="tdqkr",
        tucker_rank=sizes.get("tucker_rank"),
        rank_layout="full",
        cores=sizes.get("tucker_multihead"),
        values="prevalued" if sizes.get("pre_vdim") else "pooled",
        pre_value_dim=sizes.get("pre_vdim"),
        pre_value_activation="gelu" if sizes.get("use_glu_act", False) else "none",
        value_expansion=sizes.get("value_expand_time"),
        key_expansion=expansion,
        share_values=_window_keys(state, sizes) ** 2 / knum**2,
        share_order="ring",
        qk_norm=norm_kind(sizes.get("norm")),
        init="official",
        aux_loss_weight=0.0,
    )


def _refuse_what_does_not_run(sizes: Sizes) -> None:
    sizes.refuse("mem_output_dropout_rate", why="dropout is not supported; pass 0")
    sizes.refuse("mem_key_balance_reg_coef", why="the balance loss is not supported; pass 0")
    heads, rank = sizes.get("head"), sizes.get("tucker_rank")
    if sizes.get("q_for_each_tucker_rank"):
        sizes.require(rank == 2, "tucker_rank", "2: with a query for each rank their code fails")
        sizes.require(
            1 <= heads <= 4, "head", "from 1 to 4: they have two queries, for two heads each"
        )
    else:
        sizes.require(heads in (1, 2), "head", "1 or 2, which share one query")
    expansion, groups = sizes.get("key_expand_time"), sizes.get("value_expand_time")
    sizes.require(
        groups in (1, expansion**2), "value_expand_time", f"1 or key_expand_time^2, {expansion**2}"
    )
    ratio = sizes.get("share_ratio")
    sizes.require(0 < ratio <= 1, "share_ratio", "above 0 and at most 1")


def _window_keys(state: Mapping[str, Tensor], sizes: Sizes) -> int:
    """w, off the keys: their rounding of the root may lose one key."""
    name, expansion = "mem_blocks.0.keys", sizes.get("key_expand_time")
    if name not in state or state[name].dim() != 5:
        raise UltraMemError(
            f"{_WHAT}: the state dict has no {name} of five dimensions, only "
            f"{', '.join(sorted(state)[:4]) or 'nothing'}. Pass the entries under the "
            f"authors' names."
        )
    keys, rows = state[name].shape[2], sizes.get("knum") ** 2 * sizes.get("mem_layer_num")
    window = keys // expansion
    asked = math.sqrt(rows * sizes.get("share_ratio"))
    if keys % expansion or not asked - 2 < window <= asked + 1e-6 * asked or window**2 > rows:
        raise UltraMemError(
            f"{_WHAT}: {name} has {keys} keys a side; knum, mem_layer_num, share_ratio and "
            f"key_expand_time imply {expansion * int(asked + 1e-9)}. Pass those it was made with."
        )
    return window


def _shapes(
    names: list[_Names], config: UltraMemConfig, sizes: Sizes
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, ranks = sizes.get("hidden_size"), config.heads, config.tucker_rank
    per_rank = ranks if sizes.get("q_for_each_tucker_rank") else 1
    block: dict[str, tuple[int, ...]] = {
        "query_proj.weight": (2 * per_rank * config.key_dim, hidden),
        "keys": (heads, 2, config.keys_per_side, config.key_dim, ranks),
        "values_proj.weight": (hidden, config.value_expansion * config.value_dim),
        "shuffle_index": (config.keys_per_side**2,),
        "tucker_core_u": (1, heads, 1, ranks),
        "tucker_core_v": (1, heads, 1, ranks),
        **{f"tucker_core.{core}": (heads, ranks, ranks) for core in range(config.cores)},
    }
    yield TABLES[0], (config.num_values, config.value_dim)
    if config.values != "pooled":
        block["pre_values_proj.weight"] = (config.pre_dim, hidden)
        yield TABLES[1], (config.num_values, config.pre_dim)
    for name in names:
        for their, shape in block.items():
            yield name.theirs(their), shape
        for their, _ in name.norms():
            yield name.theirs(their), (config.key_dim,)
