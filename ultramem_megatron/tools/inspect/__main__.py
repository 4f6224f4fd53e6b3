"""What do the memories of a trained model read?

    ultramem inspect --load DIR --text FILE --out DIR

Writes fired.csv (the best values of each token), shared.csv (the tokens that share a value),
grid.csv and grid.png (reads over row and column keys), and from the TensorBoard events of training
usage.csv and usage.png.
"""

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.tools import rows


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = CommandParser(
        prog="ultramem inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--load", required=True, help="checkpoint folder (training's --save)")
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

    from ultramem_megatron.inference.loading import load_for_inference
    from ultramem_megatron.tools.inspect import pictures, tables
    from ultramem_megatron.tools.inspect.reads import record_reads

    loaded = load_for_inference(
        options.load, ckpt_step=options.ckpt_step, tokenizer_model=options.tokenizer_model
    )
    words, layers = record_reads(loaded, text, options.max_tokens)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    rows.write(out / "fired.csv", chain(*(tables.fired(words, r, options.top) for r in layers)))
    shared = chain(*(tables.shared(words, r, options.values) for r in layers))
    rows.write(out / "shared.csv", shared)
    rows.write(out / "grid.csv", chain(*map(tables.grid, layers)))
    pictures.draw_grid(layers, out / "grid.png")
    logged = options.tensorboard or loaded.args.tensorboard_dir
    usage = tables.usage(Path(logged)) if logged else []
    if usage:
        rows.write(out / "usage.csv", usage)
        pictures.draw_usage(usage, out / "usage.png")
    else:
        print(f"no metrics of memories in {logged}: usage over training is left out")
    for layer in layers:
        values = layer.values.unique().numel()
        print(f"layer {layer.layer_number}: {len(words)} tokens read {values} different values")
    print(f"wrote {out}/")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UltraMemError(f"--text {file}: {error}. Give a file of UTF-8 text.") from None


if __name__ == "__main__":
    with exit_on_user_error():
        main()
