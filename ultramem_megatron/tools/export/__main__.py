"""Export a checkpoint for transformers or as plain files, or make a checkpoint of an export.

    ultramem export --load DIR --to hf OUT
    ultramem export --load DIR --to OUT
    ultramem export --from hf OUT --save DIR
    ultramem export --from OUT --save DIR

An hf folder loads with `AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)`, the
other kind with `ultramem_megatron.tools.export.load_plain(OUT)`; neither needs Megatron. All
directions compare the logits of the two models before anything is written.
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error

if TYPE_CHECKING:
    from ultramem_megatron.tools.export.plain_model import PlainGPT


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and do it."""
    options = _parse(argv)
    with contextlib.redirect_stdout(sys.stderr):
        if options.load:  # a mistyped folder need not wait for Megatron
            from ultramem_megatron.megatron.checkpoint.folder import loaded_iteration

            loaded_iteration(options.load, options.ckpt_step)
        if options.load and options.kind == "hf":
            to_hf(
                options.load,
                options.folder,
                options.ckpt_step,
                options.tokenizer_model,
                max_shard_size=options.max_shard_size,
            )
        elif options.load:
            to_plain(options.load, options.folder, options.ckpt_step)
        else:
            to_megatron(options.folder, options.save, options.kind)
    print(options.save or options.folder)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="ultramem export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    words: dict[str, Any] = {"nargs": "+", "metavar": ("[hf] OUT", "OUT")}
    add("--load", metavar="DIR", help="Checkpoint folder (training's --save).")
    add("--ckpt-step", type=int, help="Iteration to load; default: the latest.")
    add("--tokenizer-model", metavar="DIR", help="Where the model's tokenizer is, if it moved.")
    add("--to", **words, help="New folder for the export; before it hf, for transformers.")
    add("--from", dest="source", **words, help="Folder of an export; before it hf, if it is one.")
    add("--save", metavar="DIR", help="New folder for the checkpoint.")
    add(
        "--max-shard-size",
        type=_size,
        metavar="SIZE",
        help="With --to hf: the largest file of weights, such as 500MB; a larger tensor has a file "
        "of its own. Default: 5GB.",
    )
    options = parser.parse_args(argv)
    names = ("load", "to", "source", "save")
    given = tuple(name for name in names if getattr(options, name) is not None)
    if given not in (("load", "to"), ("source", "save")):
        raise UltraMemError("Give --load DIR and --to [hf] OUT, or --from [hf] OUT and --save DIR.")
    *kind, options.folder = options.to or options.source
    if kind not in ([], ["hf"]):
        flag = "--to" if options.to else "--from"
        raise UltraMemError(f"{flag} {' '.join(kind)} {options.folder}: give OUT, or hf OUT.")
    options.kind = "hf" if kind else "plain"
    if options.max_shard_size and not (options.to and kind):
        raise UltraMemError("--max-shard-size is for --to hf OUT. Drop it.")
    return options


def _size(text: str) -> str:
    """A size as save_pretrained takes it."""
    if not re.fullmatch(r"[1-9][0-9]{0,5}(KB|MB|GB)", text):
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no size such as 500MB or 2GB")
    return text


def to_plain(load: str, folder: str, ckpt_step: int | None = None) -> None:
    """Write the model of a checkpoint as plain files. Raises UltraMemError."""
    from ultramem_megatron.tools.export.files import refuse_written, save_plain

    refuse_written(Path(folder))  # before a model is loaded
    plain, args = _loaded(load, ckpt_step)
    notes = {"tokenizer_type": args.tokenizer_type, "tokenizer_model": args.tokenizer_model}
    save_plain(plain, folder, notes)


def to_hf(
    load: str,
    folder: str,
    ckpt_step: int | None = None,
    tokenizer_model: str | None = None,
    *,
    max_shard_size: str | None = None,
) -> None:
    """Write the model of a checkpoint for transformers. Raises UltraMemError.

    tokenizer_model: where the model's tokenizer is now, if it moved. max_shard_size: of a file of
    weights, by default SHARD.
    """
    from ultramem_megatron.megatron.checkpoint.folder import loaded_iteration
    from ultramem_megatron.tools.export.hf_folder import SHARD, refuse_full, save_hf
    from ultramem_megatron.tools.export.hf_tokenizer import tokenizer_of
    from ultramem_megatron.tools.export.model_card import model_card

    refuse_full(folder)
    plain, args = _loaded(load, ckpt_step)
    if tokenizer_model is not None:
        args.tokenizer_model = tokenizer_model
    tokenizer = tokenizer_of(args)
    iteration = loaded_iteration(load, ckpt_step).name
    card = model_card(plain, args, iteration, tokenizer)
    save_hf(plain, folder, tokenizer, card, shard=max_shard_size or SHARD)
    if tokenizer.missing is not None:
        print(f"No tokenizer in {folder}: {tokenizer.missing}.")


def _loaded(load: str, ckpt_step: int | None) -> tuple["PlainGPT", argparse.Namespace]:
    from megatron.core.utils import get_model_config

    from ultramem_megatron.inference.loading import load_model
    from ultramem_megatron.megatron.flags.arguments import config_from_args
    from ultramem_megatron.tools.export.megatron import plain_config, plain_model

    model, args = load_model(load, ckpt_step=ckpt_step, local_layers=True)
    config = plain_config(args, get_model_config(model), config_from_args(args))
    return plain_model(model, config), args


def to_megatron(export: str, folder: str, kind: str = "plain") -> None:
    """Write an export as a checkpoint that training and inference load. Raises UltraMemError.

    kind: "hf" or "plain".
    """
    from ultramem_megatron.inference.layout import has_cuda
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.megatron.checkpoint.weights import refuse_checkpoint, save_weights
    from ultramem_megatron.tools.export.megatron import flags_of, load_into

    refuse_checkpoint(folder)
    plain, tokenizer = _read(export, kind, "cuda" if has_cuda() else "cpu")
    model, args = untrained_model(flags_of(plain.config), local_layers=True)
    load_into(model, plain)
    args.tokenizer_type = tokenizer.get("tokenizer_type")
    args.tokenizer_model = tokenizer.get("tokenizer_model")
    if kind == "hf":
        _keep_tokenizer(args, Path(export), Path(folder))
    if args.tokenizer_type not in (None, "NullTokenizer"):
        args.vocab_size = None  # the tokenizer says it, to whoever trains on as before
    save_weights(model, args, folder)


def _keep_tokenizer(args: argparse.Namespace, export: Path, folder: Path) -> None:
    """The folder's tokenizer, if it has one, in the checkpoint's own."""
    from ultramem_megatron.tools.export.hf_tokenizer import copy_tokenizer, has_tokenizer

    if has_tokenizer(export):
        kept = folder.resolve() / "tokenizer"
        copy_tokenizer(export, kept)
        args.tokenizer_model = str(kept)


def _read(export: str, kind: str, device: str) -> tuple["PlainGPT", dict[str, Any]]:
    if kind == "hf":
        from ultramem_megatron.tools.export.hf_folder import load_hf

        return load_hf(export, device)
    from ultramem_megatron.tools.export.files import load_plain, read_config

    return load_plain(export, device), read_config(export)[1]


if __name__ == "__main__":
    with exit_on_user_error():
        main()
