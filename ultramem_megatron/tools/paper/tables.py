"""The arithmetic columns of the paper's tables 1-3 and figure 1c, beside ours, as markdown and CSV.

Sizes of presets are partly inferred from these very columns; a row whose rounding differs shows
where the fit is rough.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ultramem_megatron.presets import PRESETS
from ultramem_megatron.tools.plan.build import command_line, parse
from ultramem_megatron.tools.plan.sizes import ModelSizes, access_ratio, model_sizes, preset_sizes


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


# Parameters in billions and FLOPs in billions, as printed.
TABLE_1 = {
    "dense-151m": ("0.15", "0.30"),
    "moe-151m-2in32": ("2.04", "0.35"),
    "ultramem-151m-x12": ("2.03", "0.35"),
    "dense-680m": ("0.68", "1.36"),
    "moe-680m-2in33": ("8.95", "1.50"),
    "ultramem-680m-x12": ("8.93", "1.49"),
    "dense-1.6b": ("1.61", "3.21"),
    "moe-1.6b-2in34": ("21.36", "3.52"),
    "ultramem-1.6b-x12": ("21.41", "3.50"),
    "dense-6.5b": ("6.44", "12.88"),
}
# Dense parameters in millions, sparse in billions, FLOPs in millions, as printed.
TABLE_2 = {
    "pkm-151m-x10": ("173.01", "1.534", "346.06"),
    "ablation-151m-x10-no-softmax": ("173.01", "1.534", "346.06"),
    "ablation-151m-x10-half-value-dim": ("178.47", "1.529", "356.98"),
    "ablation-151m-x10-share-query": ("173.46", "1.529", "346.96"),
    "ablation-151m-x10-split-skip": ("161.64", "1.536", "323.32"),
    "ablation-151m-x10-qk-norm": ("161.64", "1.536", "323.54"),
    "ablation-151m-x10-ive": ("172.37", "1.536", "344.98"),
    "ablation-151m-x10-tdqkr": ("172.37", "1.536", "344.98"),
    "ablation-151m-x10-mcs": ("172.37", "1.536", "344.98"),
    "ablation-151m-x10-init": ("172.37", "1.536", "344.98"),
    "ablation-151m-x10-value-lr": ("172.37", "1.536", "344.98"),
    "ablation-151m-x10-query-conv": ("172.38", "1.536", "345.02"),
}
_ONE_HEADS_VALUES = frozenset(list(TABLE_2)[:5])
"""Rows in which the paper counts the values read by one head of one layer only."""
# Row, the row it is compared with, what varies, and the change of FLOPs in percent, as printed.
TABLE_3 = (
    ("ablation-151m-x10-ive", "ablation-151m-x10-qk-norm", "E = 4", "6.6"),
    ("ablation-151m-x10-e9", "ablation-151m-x10-qk-norm", "E = 9", "14.9"),
    ("ablation-151m-x10-e16", "ablation-151m-x10-qk-norm", "E = 16", "26.4"),
    ("ablation-151m-x10-tdqkr", "ablation-151m-x10-ive", "r = 2", "0.001"),
    ("ablation-151m-x10-r3", "ablation-151m-x10-ive", "r = 3", "0.002"),
    ("ablation-151m-x10-r4", "ablation-151m-x10-ive", "r = 4", "0.003"),
    ("ablation-151m-x10-mcs", "ablation-151m-x10-tdqkr", "h = 2", "0.001"),
    ("ablation-151m-x10-h4", "ablation-151m-x10-tdqkr", "h = 4", "0.003"),
    ("ablation-151m-x10-h8", "ablation-151m-x10-tdqkr", "h = 8", "0.007"),
)
FIGURE_1C = {16: "18.1", 64: "18.8", 256: "17.3", 1024: "13.0"}
"""MoE's weight bytes over UltraMem's, by batch size, 1.6B models."""


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
            Cell(dense, sizes.dense / 1e6), Cell(sparse, sizes.sparse / 1e9),
            Cell(flops, counted / 1e6),
        )  # fmt: skip
    return rows


def _pooled(name: str, sizes: ModelSizes) -> int:
    if name not in _ONE_HEADS_VALUES:
        return sizes.activated_sparse
    memory = PRESETS[name].memory
    return int(memory["topk"].value) * int(memory["value_dim"].value)


def table_3() -> dict[str, tuple[Cell, ...]]:
    """Change of FLOPs in percent. The row of r = 3 is compared at its own key width, 501."""
    rows: dict[str, tuple[Cell, ...]] = {}
    for name, base, change, percent in TABLE_3:
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
        ("Figure 1c", "batch", ("bytes, MoE / UltraMem",),
         {str(batch): (cell,) for batch, cell in figure_1c().items()}),
    )  # fmt: skip


def markdown() -> str:
    """All of them; each quantity as the paper prints it, then ours with one digit more."""
    return "\n\n".join(_markdown(*table) for table in _all())


def write_csv(path: Path) -> None:
    """All of them, a quantity a line; `agrees`: to the digits that the paper prints."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "row", "quantity", "paper", "ours", "agrees"])
        for title, _, quantities, rows in _all():
            for name, cells in rows.items():
                for quantity, cell in zip(quantities, cells, strict=True):
                    line = [title, name, quantity, cell.paper, f"{cell.ours:.6g}", int(cell.agrees)]
                    writer.writerow(line)


def _markdown(
    title: str, first: str, columns: Sequence[str], rows: dict[str, tuple[Cell, ...]]
) -> str:
    headings = " | ".join(f"{column}: paper | ours" for column in columns)
    lines = [
        f"**{title}**", "", f"| {first} | {headings} |",
        "|---" * (1 + 2 * len(columns)) + "|",
        *(f"| {name} | " + " | ".join(map(str, cells)) + " |" for name, cells in rows.items()),
    ]  # fmt: skip
    return "\n".join(lines)
