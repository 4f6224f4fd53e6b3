"""Export a checkpoint to plain safetensors and JSON, or make a checkpoint of an export.

    ultramem export --load DIR --to OUT
    ultramem export --from OUT --save DIR

OUT loads without Megatron: `ultramem_megatron.tools.export.load_plain(OUT)`. Both directions
compare the logits of the two models before anything is written.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence

from ultramem_megatron.errors import UltraMemError, exit_on_user_error


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and do it."""
    options = _parse(argv)
    with contextlib.redirect_stdout(sys.stderr):
        if options.load:
            to_plain(options.load, options.to, options.ckpt_step)
        else:
            to_megatron(options.plain, options.save)
    print(options.to or options.save)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ultramem export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--load", metavar="DIR", help="Checkpoint folder (training's --save).")
    add("--ckpt-step", type=int, help="Iteration to load; default: the latest.")
    add("--to", metavar="OUT", help="New folder for the export.")
    add("--from", dest="plain", metavar="OUT", help="Folder of an export.")
    add("--save", metavar="DIR", help="New folder for the checkpoint.")
    options = parser.parse_args(argv)
    given = tuple(
        name for name in ("load", "to", "plain", "save") if getattr(options, name) is not None
    )
    if given not in (("load", "to"), ("plain", "save")):
        raise UltraMemError("Give --load DIR and --to OUT, or --from OUT and --save DIR.")
    return options


def to_plain(load: str, folder: str, ckpt_step: int | None = None) -> None:
    """Write the model of a checkpoint as plain files. Raises UltraMemError."""
    from megatron.core.utils import get_model_config

    from ultramem_megatron.inference.loading import load_model
    from ultramem_megatron.megatron.flags.arguments import config_from_args
    from ultramem_megatron.tools.export.files import save_plain
    from ultramem_megatron.tools.export.megatron import plain_config, plain_model

    model, args = load_model(load, ckpt_step=ckpt_step, local_layers=True)
    config = plain_config(args, get_model_config(model), config_from_args(args))
    notes = {"tokenizer_type": args.tokenizer_type, "tokenizer_model": args.tokenizer_model}
    save_plain(plain_model(model, config), folder, notes)


def to_megatron(plain: str, folder: str) -> None:
    """Write an export as a checkpoint that training and inference load. Raises UltraMemError."""
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.megatron.checkpoint.weights import save_weights
    from ultramem_megatron.tools.export.files import load_plain, read_config
    from ultramem_megatron.tools.export.megatron import flags_of, load_into

    config, notes = read_config(plain)
    model, args = untrained_model(flags_of(config), local_layers=True)
    load_into(model, load_plain(plain, next(model.parameters()).device))
    for name in ("tokenizer_type", "tokenizer_model"):
        setattr(args, name, notes.get(name))
    save_weights(model, args, folder)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
