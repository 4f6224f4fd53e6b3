"""The value tables of a folder for transformers in 8 bits, in a folder beside it.

    ultramem quantize FOLDER OUT [--format int8|fp8] [--block 64]

A value is a code times a scale: one scale for each row, or for every --block values of a row.
Everything else stays as it is. What comes out is read, not trained, and does not go back.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error

if TYPE_CHECKING:
    from torch import Tensor

_AT_ONCE = 2**16  # rows
_WRITTEN_ANEW = ("SHA256SUMS", ".py", ".safetensors", ".safetensors.index.json")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Raises UltraMemError."""
    parser = CommandParser(
        prog="ultramem quantize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="written by ultramem export --to hf")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--format", choices=("int8", "fp8"), default="int8")
    parser.add_argument("--block", type=int, help="values with a scale in common; default: a row")
    args = parser.parse_args(argv)
    quantize(args.folder, args.out, args.format, args.block)


def quantize(folder: Path, out: Path, kind: str, block: int | None) -> None:
    """Write `out`, a folder as `folder` with its value tables in 8 bits; says what that changes.

    kind: int8 or fp8 (e4m3). block: values of a row with a scale in common, None for all. Raises
    UltraMemError.
    """
    from ultramem_megatron.faults.results_folder import written_whole
    from ultramem_megatron.kernels.quantized import check_block
    from ultramem_megatron.tools.export import hf_folder

    hf_folder.refuse_full(out)
    config = hf_folder.read_config(folder)[1]
    hf_folder.check_sums(folder)
    if config.memory is None:
        raise UltraMemError(f"{folder} holds a model without memories: nothing to quantize.")
    widths = (config.memory["value_dim"], config.memory["pre_value_dim"])
    check_block("--block", block, *widths)
    state = _quantized(hf_folder.read_weights(folder, "cpu"), kind, block)
    config.value_quantization = {"format": kind, "block": block}
    model = hf_folder.with_weights(config, state, f"The weights in {folder} do not fit config.json")
    with written_whole(out):
        model.save_pretrained(out, max_shard_size=hf_folder.SHARD)
        for file in sorted(folder.iterdir()):
            written = file.name == "config.json" or file.name.endswith(_WRITTEN_ANEW)
            if file.is_file() and not written:
                shutil.copyfile(file, out / file.name)
        _say_so(out / "README.md", kind, block)
        hf_folder.copy_sources(out)
        hf_folder.finish(out)


def _quantized(state: "dict[str, Tensor]", kind: str, block: int | None) -> "dict[str, Tensor]":
    from ultramem_megatron.memory.tables.value_table import names_a_table

    quantized = {}
    for name, tensor in state.items():
        if not names_a_table(name):
            quantized[name] = tensor
            continue
        codes, scales, error = quantize_table(tensor, kind, block or tensor.shape[1])
        stem = name.removesuffix("weight")
        quantized |= {f"{stem}codes": codes, f"{stem}scales": scales}
        before, after = tensor.nbytes, codes.nbytes + scales.nbytes
        print(
            f"{name}: {before / 1e6:,.1f} -> {after / 1e6:,.1f} MB, error {error:.2%} of the "
            f"values (root mean square)",
            flush=True,
        )
    return quantized


def quantize_table(table: "Tensor", kind: str, block: int) -> "tuple[Tensor, Tensor, float]":
    """Codes (N, V) uint8, scales (N, V/block) float32, and their relative error, of a table (N, V).

    kind: int8 (as two's complement) or fp8 (e4m3). A block's largest value gets the largest code.
    Raises UltraMemError where the table is not finite.
    """
    import torch

    from ultramem_megatron.kernels.quantized import quantized

    number, width = table.shape
    codes = torch.empty(number, width, dtype=torch.uint8)
    scales = torch.empty(number, width // block, dtype=torch.float32)
    missed = total = 0.0
    for start in range(0, number, _AT_ONCE):
        rows = slice(start, min(start + _AT_ONCE, number))
        values = table[rows].float()
        found = quantized(values, kind, block)
        codes[rows], scales[rows] = found.codes.view(torch.uint8), found.scales
        missed += float((found.values() - values).double().square().sum())
        total += float(values.double().square().sum())
    return codes, scales, (missed / total) ** 0.5 if total else 0.0


def _say_so(card: Path, kind: str, block: int | None) -> None:
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        scaled = "row" if block is None else f"{block} values"
        note = f"\n## Quantized\n\nValue tables are {kind}, a scale for every {scaled}.\n"
        card.write_text(text + note, encoding="utf-8")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
