"""What do the memories of a trained model read?

    ultramem inspect --load DIR --text FILE --out DIR

DIR: a training's --save, or what `ultramem export --to hf` or `ultramem quantize` wrote.
Writes fired.csv (the best values of each token), shared.csv (the tokens that share a value),
grid.csv and grid.png (reads over row and column keys), and from the TensorBoard events of training
usage.csv and usage.png.
"""

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.faults.results_folder import results_folder
from ultramem_megatron.tools import rows

if TYPE_CHECKING:
    from ultramem_megatron.tools.inspect.reads import Reads


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = CommandParser(
        prog="ultramem inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--load", required=True, help="folder of checkpoints, or one for transformers")
    add("--ckpt-step", type=int, help="iteration to load (default: the latest)")
    add("--text", type=Path, required=True, help="UTF-8 file to run through the model")
    add("--out", type=Path, required=True, help="folder for the CSVs and pictures")
    add("--max-tokens", type=int, default=4096, help="of the text (default: %(default)s)")
    add("--top", type=int, default=4, help="values listed of each token (default: %(default)s)")
    add("--values", type=int, default=100, help="most read values listed (default: %(default)s)")
    add("--tokenizer-model", help="where the tokenizer is, if it has moved")
    add("--tensorboard", type=Path, help="events of training (default: where training wrote them)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Load, run, write. Raises UltraMemError for what the user can put right."""
    options = parse(argv)
    for name in ("max_tokens", "top", "values"):
        if getattr(options, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UltraMemError(f"{flag} {getattr(options, name)}: must be a whole number >= 1.")
    text = _read_text(options.text)
    out = results_folder(options.out)

    from ultramem_megatron.tools.inspect import pictures, tables

    words, layers, logged = _recorded(options, text)
    rows.write(out / "fired.csv", chain(*(tables.fired(words, r, options.top) for r in layers)))
    shared = chain(*(tables.shared(words, r, options.values) for r in layers))
    rows.write(out / "shared.csv", shared)
    rows.write(out / "grid.csv", chain(*map(tables.grid, layers)))
    pictures.draw_grid(layers, out / "grid.png")
    usage = tables.usage(logged) if logged else []
    if usage:
        rows.write(out / "usage.csv", usage)
        pictures.draw_usage(usage, out / "usage.png")
    else:
        where = logged or "a folder for transformers (--tensorboard)"
        print(f"no metrics of memories in {where}: usage over training is left out")
    for layer in layers:
        values = layer.values.unique().numel()
        print(f"layer {layer.layer_number}: {len(words)} tokens read {values} different values")
    print(f"wrote {out}/")


def _recorded(
    options: argparse.Namespace, text: str
) -> "tuple[list[str], list[Reads], Path | None]":
    """Tokens, what memories read for them, and the folder of training's TensorBoard events."""
    if (Path(options.load) / "config.json").is_file():
        from ultramem_megatron.tools.export.opened_folder import open_folder
        from ultramem_megatron.tools.inspect.hf_reads import record_hf_reads

        for flag in ("ckpt_step", "tokenizer_model"):
            if getattr(options, flag) is not None:
                name = "--" + flag.replace("_", "-")
                raise UltraMemError(
                    f"{name} is of checkpoints; {options.load} is a folder for transformers, with "
                    f"one model and its own tokenizer. Leave {name} out."
                )
        opened = open_folder(Path(options.load))
        return *record_hf_reads(opened, text, options.max_tokens), options.tensorboard
    from ultramem_megatron.inference.loading import load_for_inference
    from ultramem_megatron.tools.inspect.reads import record_reads

    loaded = load_for_inference(
        options.load, ckpt_step=options.ckpt_step, tokenizer_model=options.tokenizer_model
    )
    written = options.tensorboard or loaded.args.tensorboard_dir
    return *record_reads(loaded, text, options.max_tokens), Path(written) if written else None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UltraMemError(f"--text {file}: {error}. Give a file of UTF-8 text.") from None


if __name__ == "__main__":
    with exit_on_user_error():
        main()
