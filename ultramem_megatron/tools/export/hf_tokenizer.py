"""The tokenizer a model was trained with, as transformers has it; or why there is none."""

import shutil
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultramem_megatron.errors import UltraMemError

_SAMPLES = (
    "A memory layer reads few values.",
    "  two  blanks\n\n\ttabs, lines\n",
    "Zürich 東京 № 3.14 🙂",
    "def f(x): return x**2  # 1,000,000",
)
"""Texts whose ids two tokenizers must agree on to count as one."""
_FLAGS = ("tokenizer_type", "tokenizer_model")


_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What a tokenizer consists of, in a folder of transformers; never code."""


@dataclass(frozen=True)
class HFTokenizer:
    """What goes into a folder about the tokenizer.

    tokenizer: one of transformers', or None, and then `missing` says why. eod: the id that ends a
    text, if any. ids: how many there are; the rest of the vocabulary is padding. flags: Megatron's.
    """

    tokenizer: Any = None
    missing: str | None = None
    eod: int | None = None
    ids: int | None = None
    flags: dict[str, Any] = field(default_factory=dict)

    def configure(self, model: Any) -> None:
        """Tell a model's `generate` which ids end a text, pad a batch, or stand for nothing."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        pad = self.eod if pad is None else pad
        rows = model.config.vocab_size
        for holder in (model.config, model.generation_config):
            holder.eos_token_id, holder.pad_token_id = self.eod, pad
            holder.bos_token_id = getattr(self.tokenizer, "bos_token_id", None)
        if self.ids is not None and self.ids < rows:
            model.generation_config.suppress_tokens = list(range(self.ids, rows))

    def save(self, folder: Path) -> None:
        """Write its files, if there are any."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def tokenizer_of(args: Namespace) -> HFTokenizer:
    """Of the model of Megatron's flags `args`. Raises UltraMemError if its files are not there."""
    from ultramem_megatron.inference.loading import open_model_tokenizer

    flags: dict[str, Any] = {name: getattr(args, name, None) for name in _FLAGS}
    if not args.tokenizer_type or "Null" in args.tokenizer_type:
        missing = f"the model was trained on ids without a text ({args.tokenizer_type})"
        return HFTokenizer(missing=missing, flags=flags)
    megatron = open_model_tokenizer(args)
    found, why = _as_transformers(megatron._tokenizer, args)
    ids, eod = int(megatron.vocab_size), megatron.eod
    if found is not None:
        _complete(found, args)
    if args.tokenizer_model is not None:  # not where it was on the machine that trained
        flags["tokenizer_model"] = Path(args.tokenizer_model).name
    return HFTokenizer(found, why, None if eod is None else int(eod), ids, flags)


def has_tokenizer(folder: Path) -> bool:
    """Whether transformers finds a tokenizer in a folder."""
    return (folder / _FILES[0]).is_file()


def copy_tokenizer(folder: Path, target: Path) -> None:
    """The tokenizer's files alone, in a new folder: beside a model, transformers asks for its code.

    Raises UltraMemError if there is something already.
    """
    if target.exists():
        raise UltraMemError(f"{target} is there already. Choose another folder.")
    target.mkdir(parents=True)
    for name in _FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def _as_transformers(library: Any, args: Namespace) -> tuple[Any, str | None]:
    """transformers' own tokenizer behind Megatron's, or one made of its files; or why not."""
    from transformers import PreTrainedTokenizerBase

    inner = getattr(library, "tokenizer", None)
    if isinstance(inner, PreTrainedTokenizerBase):
        return inner, None
    if args.tokenizer_model and str(args.tokenizer_model).endswith(".model"):
        for make in (_of_unigrams, _of_merges):
            made = make(str(args.tokenizer_model))
            if made is not None and _agree(made, library):
                _name_special(made, library)
                return made, None
    return None, f"transformers has none that gives the ids of this {args.tokenizer_type}"


def _of_unigrams(file: str) -> Any:
    """A sentencepiece model of unigrams; None for another."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SpmConverter

    try:
        return PreTrainedTokenizerFast(
            tokenizer_object=SpmConverter(Namespace(vocab_file=file)).converted()
        )
    except Exception:  # whatever it stumbles over, it made no tokenizer
        return None


def _of_merges(file: str) -> Any:
    """A sentencepiece model of byte pairs; None for another."""
    from transformers import LlamaTokenizer

    try:
        return LlamaTokenizer.from_pretrained(file)
    except Exception:  # as above
        return None


def _agree(ours: Any, megatron: Any) -> bool:
    try:
        return all(
            ours(text, add_special_tokens=False).input_ids == megatron.text_to_ids(text)
            for text in _SAMPLES
        )
    except Exception:  # a text that either cannot read is no agreement
        return False


def _name_special(tokenizer: Any, library: Any) -> None:
    """Tell it which of its tokens begin and end a text."""
    for name in ("bos", "eos"):
        token = getattr(library, f"{name}_id", None)
        if token is not None and token >= 0:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(token)))


def _complete(tokenizer: Any, args: Namespace) -> None:
    """What a decoder needs of it: room, batches padded before their texts, a chat's form."""
    tokenizer.model_max_length = args.max_position_embeddings
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if getattr(args, "chat_template", None):
        tokenizer.chat_template = args.chat_template
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
