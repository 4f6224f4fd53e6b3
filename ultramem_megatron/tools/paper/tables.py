"""The arithmetic columns of the paper's tables 1-3 and figure 1c, beside ours, as markdown and CSV.

Sizes of presets are partly inferred from these very columns; a row whose rounding differs shows
where the fit is rough.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ultramem_megatron.presets import PRESETS
from ultramem_megatron.presets.printed import FIGURE_1C, TABLE_1, TABLE_2, TABLE_3
from ultramem_megatron.tools.plan.build import command_line, parse
from ultramem_megatron.tools.plan.sizes import ModelSizes, access_ratio, model_sizes, preset_sizes
from ultramem_megatron.tools.rows import Row


class Cell(NamedTuple):
    """A number as the paper prints it, and ours in the same unit."""

    paper: str
    ours: float

    @property
    def agrees(self) -> bool:
        """Whether ours, rounded to the paper's digits, is what it prints."""
        decimals = len(self.paper.partition(".")[2])
        return f"{self.ours:.{decimals}f}" == self.paper

    def __str__(self) -> str:
        decimals = len(self.paper.partition(".")[2])
        shown = f"{self.ours:.{decimals + 1}f}"
        return f"{self.paper} | {shown}" + ("" if self.agrees else " (rough)")


_ONE_HEADS_VALUES = frozenset(list(TABLE_2)[:5])
"""Rows in which the paper counts the values read by one head of one layer only."""

_X10 = "ablation-151m-x10-"
_CHANGES = {
    "E = 4": ("ive", "qk-norm"),
    "E = 9": ("e9", "qk-norm"),
    "E = 16": ("e16", "qk-norm"),
    "r = 2": ("tdqkr", "ive"),
    "r = 3": ("r3", "ive"),
    "r = 4": ("r4", "ive"),
    "h = 2": ("mcs", "tdqkr"),
    "h = 4": ("h4", "tdqkr"),
    "h = 8": ("h8", "tdqkr"),
}
"""Rows of table 3: the ablation, and the one that it is compared with."""


def table_1() -> dict[str, tuple[Cell, ...]]:
    """Parameters and FLOPs of the ten models."""
    return {
        name: (
            Cell(params, preset_sizes(name).total / 1e9),
            Cell(flops, preset_sizes(name).flops_per_token / 1e9),
        )
        for name, (params, flops) in TABLE_1.items()
    }


def table_2() -> dict[str, tuple[Cell, ...]]:
    """Dense and sparse parameters and FLOPs of the ablation, counted as the paper did each row."""
    rows: dict[str, tuple[Cell, ...]] = {}
    for name, (dense, sparse, flops) in TABLE_2.items():
        sizes = preset_sizes(name)
        counted = 2 * (sizes.dense + _pooled(name, sizes))
        rows[name] = (
            Cell(dense, sizes.dense / 1e6),
            Cell(sparse, sizes.sparse / 1e9),
            Cell(flops, counted / 1e6),
        )
    return rows


def _pooled(name: str, sizes: ModelSizes) -> int:
    if name not in _ONE_HEADS_VALUES:
        return sizes.activated_sparse
    memory = PRESETS[name].memory
    return int(memory["topk"].value) * int(memory["value_dim"].value)


def table_3() -> dict[str, tuple[Cell, ...]]:
    """Change of FLOPs in percent. The row of r = 3 is compared at its own key width, 501."""
    rows: dict[str, tuple[Cell, ...]] = {}
    for change, percent in TABLE_3.items():
        name, base = (_X10 + row for row in _CHANGES[change])
        memory = PRESETS[name].memory
        same_keys = ("--ultramem-key-dim", str(memory["key_dim"].value))
        before = model_sizes(parse(command_line(base, same_keys))).flops_per_token
        after = preset_sizes(name).flops_per_token + _grid_flops(name) - _grid_flops(base)
        rows[change] = (Cell(percent, 100 * (after - before) / before),)
    return rows


def _grid_flops(name: str) -> int:
    """FLOPs of scoring the m*m candidates, which only table 3 counts; inferred from its digits.

    Two for each candidate, rank above one and core above one; one head of one layer.
    """
    memory = PRESETS[name].memory
    rank, cores, top = (int(memory[field].value) for field in ("tucker_rank", "cores", "topk"))
    return 2 * top**2 * (rank - 1 + cores - 1)


def figure_1c() -> dict[int, Cell]:
    """Weight bytes of MoE-1.6B-2in34 over those of UltraMem-1.6B-x12, by batch size."""
    moe, ultramem = (preset_sizes(name).reads for name in ("moe-1.6b-2in34", "ultramem-1.6b-x12"))
    ratios = access_ratio(moe, ultramem, FIGURE_1C)
    return {batch: Cell(FIGURE_1C[batch], ratio) for batch, ratio in ratios.items()}


Table = tuple[str, str, tuple[str, ...], dict[str, tuple[Cell, ...]]]
"""Title, what a row is, quantities, and rows."""


def _all() -> tuple[Table, ...]:
    return (
        ("Table 1", "model", ("parameters, 1e9", "FLOPs, 1e9"), table_1()),
        ("Table 2", "row", ("dense, 1e6", "sparse, 1e9", "FLOPs, 1e6"), table_2()),
        ("Table 3", "change", ("FLOPs, + %",), table_3()),
        (
            "Figure 1c",
            "batch",
            ("bytes, MoE / UltraMem",),
            {str(batch): (cell,) for batch, cell in figure_1c().items()},
        ),
    )


def markdown() -> str:
    """All of them; each quantity as the paper prints it, then ours with one digit more."""
    return "\n\n".join(_markdown(*table) for table in _all())


def lines() -> Iterator[Row]:
    """All of them for a CSV, a quantity a line; `agrees`: to the digits that the paper prints."""
    for title, _, quantities, table in _all():
        for name, cells in table.items():
            for quantity, cell in zip(quantities, cells, strict=True):
                yield {
                    "table": title,
                    "row": name,
                    "quantity": quantity,
                    "paper": cell.paper,
                    "ours": f"{cell.ours:.6g}",
                    "agrees": int(cell.agrees),
                }


def _markdown(
    title: str, first: str, columns: Sequence[str], rows: dict[str, tuple[Cell, ...]]
) -> str:
    headings = " | ".join(f"{column}: paper | ours" for column in columns)
    lines = [
        f"**{title}**",
        "",
        f"| {first} | {headings} |",
        "|---" * (1 + 2 * len(columns)) + "|",
        *(f"| {name} | " + " | ".join(map(str, cells)) + " |" for name, cells in rows.items()),
    ]
    return "\n".join(lines)
