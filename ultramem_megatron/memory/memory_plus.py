"""Exchange with Memory+ (arXiv 2412.09764, the authors' HashingMemory), all memories of a model.

Their names below `layers.{l}.feed_forward.`, left, and ours; H heads, n keys a side, Dk both
halves of a key:
    keys                        (2 H n, Dk/2)     retrieval.keys.weight, (H, 2, n, 1, Dk/2)
    query_proj.query_mlps.0.*   (H Dk, D), (H Dk,)   query.proj.*
    values.weight               (n^2, Dv)         values.table.weight, of the first memory
    swilu_projection.*          (Dv, D), (Dv,)    values.gate.*
    value_proj.*                (D, Dv), (D,)     value_proj.*
    gating.*                    (1, D), (1,)      of a gate of the output, with `mem_gated`
    values_u.weight, values_v.weight   (n^2, D)   values.pre_table.weight, values.table.weight, with
                                                  `peer_variant`, which uses no projections
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.foreign import Entry, ForeignMemories, Sizes, check_shapes, tensors
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.modules import Linear
from ultramem_megatron.memory.spans import Span
from ultramem_megatron.memory.values import VALUES
from ultramem_megatron.memory.values.contract import Site

_WHAT = "Memory+"
_QUERY = "query_proj.query_mlps.0"
_KEYS = re.compile(r"layers\.(\d+)\.feed_forward\.keys")
_NO_DROPOUT = "dropout is not supported; pass 0"


class GatedOutput(nn.Module):
    """A memory whose output is multiplied by one gate for each token, sigmoid(w x + b)."""

    def __init__(self, memory: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.memory = memory
        self.gating = Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) to the same."""
        return self.memory(x) * self.gating(x).sigmoid()


def load_memory_plus(state_dict: Mapping[str, Any], cfg: Mapping[str, Any]) -> ForeignMemories:
    """The memories of a model of the authors'; dtypes and device are the tensors'.

    state_dict: `layers.{l}.feed_forward.*` of the memories alone, tensors or numpy arrays; shared
    values stand at any one of them, or at several, equal. cfg: `dim`, `mem_n_keys`, `mem_heads`,
    `mem_knn`, `mem_k_dim`, `mem_v_dim`, `mem_share_values`, `swilu_projection`, `mem_gated`,
    `peer_variant`. Raises UltraMemError for what their code cannot run.
    """
    state, sizes = tensors(state_dict), Sizes(cfg, _WHAT)
    names = _names(state, sizes)
    config = _config(names[0], sizes)
    layers, shared = [], None
    for name in names:
        with torch.device("meta"):
            if shared is None or not sizes.get("mem_share_values"):
                shared = None
            shared = VALUES[config.values].build(config, Site(sizes.get("dim"), shared=shared))
            layer = UltraMemLayer(config, hidden_size=sizes.get("dim"), num_layers=1, values=shared)
            if not name.has(f"{_QUERY}.bias"):
                layer.query.proj.register_parameter("bias", None)
            gated = GatedOutput(layer, sizes.get("dim")) if sizes.get("mem_gated") else layer
        layers.append(gated)
    entries: dict[str, Entry] = {}
    ours: dict[str, Tensor] = {}
    for name in names:
        entries |= name.entries()
        ours |= name.ours(names)
    return ForeignMemories(layers, entries).take(ours)


def to_memory_plus(memories: ForeignMemories) -> dict[str, Tensor]:
    """The authors' state dict, detached copies; inverse of `load_memory_plus`."""
    return memories.authors_state()


class _Names:
    """The entries of one memory, there and back."""

    def __init__(self, place: int, layer: int, state: Mapping[str, Tensor], sizes: Sizes) -> None:
        """place: among the memories. layer: of the model, in their names."""
        self._prefix, self._mine = f"layers.{layer}.feed_forward.", f"layers.{place}."
        self._state, self._sizes = state, sizes
        if sizes.get("mem_gated"):
            self._memory = f"{self._mine}memory."
        else:
            self._memory = self._mine

    def has(self, name: str) -> bool:
        return self._prefix + name in self._state

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Of what has to be there; its tables, query bias and gate apart."""
        hidden, width = self._sizes.get("dim"), value_dim(self._sizes)
        heads, keys, both = (self._sizes.get(f"mem_{n}") for n in ("heads", "n_keys", "k_dim"))
        found: dict[str, tuple[int, ...]] = {
            "keys": (2 * heads * keys, both // 2),
            f"{_QUERY}.weight": (heads * both, hidden),
        }
        if self.has(f"{_QUERY}.bias"):
            found[f"{_QUERY}.bias"] = (heads * both,)
        if self._sizes.get("swilu_projection"):
            found |= {"swilu_projection.weight": (width, hidden), "swilu_projection.bias": (width,)}
        if self._sizes.get("swilu_projection") or self._sizes.get("mem_v_dim") > 0:
            found |= {"value_proj.weight": (hidden, width), "value_proj.bias": (hidden,)}
        if self._sizes.get("mem_gated"):
            found |= {"gating.weight": (1, hidden), "gating.bias": (1,)}
        for table in self.tables():
            found[table] = (keys**2, width)
        return ((self._prefix + name, shape) for name, shape in found.items())

    def tables(self) -> dict[str, str]:
        """Their name of each table that stands here, and ours."""
        return {their: mine for their, mine in _tables(self._sizes).items() if self.has(their)}

    def table(self, name: str) -> Tensor:
        return self._state[self._prefix + name]

    def _parameters(self) -> dict[str, str]:
        """Their names of what is neither keys nor tables, and ours."""
        found = {f"{_QUERY}.{p}": f"{self._memory}query.proj.{p}" for p in ("weight", "bias")}
        for part in ("weight", "bias"):
            found[f"gating.{part}"] = f"{self._mine}gating.{part}"
            if not self._sizes.get("peer_variant"):
                found[f"swilu_projection.{part}"] = f"{self._memory}values.gate.{part}"
                found[f"value_proj.{part}"] = f"{self._memory}value_proj.{part}"
        return {their: mine for their, mine in found.items() if self.has(their)}

    def entries(self) -> dict[str, Entry]:
        found = {name: Entry(mine) for name, mine in self._parameters().items()}
        found["keys"] = Entry(f"{self._memory}retrieval.keys.weight", lambda w: w.flatten(0, 3))
        for their, mine in self.tables().items():
            found[their] = Entry(self._memory + mine)
        for name in (n for n, _ in self.shapes()):
            short = name.removeprefix(self._prefix)
            if short not in found:  # made by their constructor, read by nothing
                found[short] = Entry(None, unused=self._state[name])
        return {self._prefix + name: entry for name, entry in found.items()}

    def ours(self, all_names: "list[_Names]") -> dict[str, Tensor]:
        heads, keys, both = (self._sizes.get(f"mem_{n}") for n in ("heads", "n_keys", "k_dim"))
        found = {mine: self._state[self._prefix + n] for n, mine in self._parameters().items()}
        by_head = self._state[f"{self._prefix}keys"].view(heads, 2, keys, 1, both // 2)
        found[f"{self._memory}retrieval.keys.weight"] = by_head
        for their, mine in _tables(self._sizes).items():
            owner = next(name for name in [self, *all_names] if name.has(their))
            found[self._memory + mine] = owner.table(their)
        return found


def value_dim(sizes: Sizes) -> int:
    """Dv; their -1 is the hidden size."""
    width: int = sizes.get("mem_v_dim")
    return width if width > 0 else sizes.get("dim")


def _tables(sizes: Sizes) -> dict[str, str]:
    """Their name of each table of a memory, and ours."""
    if sizes.get("peer_variant"):
        return {
            "values_u.weight": "values.pre_table.weight",
            "values_v.weight": "values.table.weight",
        }
    gated = sizes.get("swilu_projection")
    return {"values.weight": "values.table.weight" if gated else "values.weight"}


def _names(state: Mapping[str, Tensor], sizes: Sizes) -> list[_Names]:
    """Of all memories, checked."""
    _refuse_what_does_not_run(sizes)
    layers = sorted(int(found[1]) for name in state if (found := _KEYS.fullmatch(name)))
    if not layers:
        raise UltraMemError(
            f"{_WHAT}: the state dict has no layers.N.feed_forward.keys, only "
            f"{', '.join(sorted(state)[:4]) or 'nothing'}. Pass the entries under the "
            f"authors' names."
        )
    names = [_Names(place, layer, state, sizes) for place, layer in enumerate(layers)]
    check_shapes(state, dict(entry for name in names for entry in name.shapes()), _WHAT)
    for table in _tables(sizes):
        having = [name for name in names if name.has(table)]
        _check_owners(table, having, names, sizes)
    return names


def _check_owners(table: str, having: list[_Names], names: list[_Names], sizes: Sizes) -> None:
    if not sizes.get("mem_share_values") and len(having) < len(names):
        raise UltraMemError(
            f"{_WHAT}: {len(having)} of {len(names)} memories have {table}; with "
            f"mem_share_values=False each needs its own. Pass True if they share it."
        )
    if not having:
        raise UltraMemError(f"{_WHAT}: no memory has {table}. Pass the table with the rest.")
    first = having[0].table(table)
    if sizes.get("mem_share_values") and any(not n.table(table).equal(first) for n in having):
        raise UltraMemError(
            f"{_WHAT}: with mem_share_values=True one memory has {table}, or several the same; "
            f"here {len(having)} have it, and they differ. Pass False if each has its own."
        )


def _refuse_what_does_not_run(sizes: Sizes) -> None:
    sizes.refuse(
        "mem_query_batchnorm", why="queries of a token would depend on the others of its batch"
    )
    sizes.refuse("mem_input_dropout", "mem_query_dropout", "mem_value_dropout", why=_NO_DROPOUT)
    sizes.require(sizes.get("mem_heads") >= 2, "mem_heads", "at least 2, as in their code")
    sizes.require(sizes.get("mem_k_dim") % 2 == 0, "mem_k_dim", "even: a half for each side")
    if sizes.get("peer_variant"):
        sizes.require(sizes.get("mem_v_dim") <= 0, "mem_v_dim", "-1 with peer_variant")


def _config(name: _Names, sizes: Sizes) -> UltraMemConfig:
    peer, gated = sizes.get("peer_variant"), sizes.get("swilu_projection")
    return UltraMemConfig(
        spans=(Span(1, 1),),
        num_keys=sizes.get("mem_n_keys"),
        key_dim=sizes.get("mem_k_dim") // 2,
        value_dim=value_dim(sizes),
        topk=sizes.get("mem_knn"),
        heads=sizes.get("mem_heads"),
        share_query=False,
        retrieval="pkm",
        tucker_rank=1,
        cores=1,
        values="prevalued" if peer else "gated" if gated else "pooled",
        pre_value_activation="gelu" if peer else "none",
        value_expansion=1,
        value_projection=not peer and (gated or sizes.get("mem_v_dim") > 0),
        projection_bias=True,
        softmax=True,
        qk_norm="none",
        init="official",
        aux_loss_weight=0.0,
    )
