"""Text to the ids of a loaded model, with what cannot be read or looked up said in one line."""

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.inference.loading import LoadedModel


def require_text(loaded: LoadedModel) -> None:
    """Raise UltraMemError where ids stand for no text: nothing can be printed or ended."""
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    if isinstance(getattr(loaded.tokenizer, "_tokenizer", None), NullTokenizer):
        raise UltraMemError(
            "the model was trained with NullTokenizer, as mock data are: its ids stand for no "
            "text. Train on text with a tokenizer (ultramem data prepare makes both)."
        )


def token_ids(loaded: LoadedModel, text: str, what: str) -> list[int]:
    """Ids of a text. what: its flag and name, for the message. Raises UltraMemError."""
    try:
        ids: list[int] = loaded.tokenizer.tokenize(text)
    except ValueError as error:
        raise UltraMemError(
            f"{what} {text!r:.80} cannot be read with {loaded.args.tokenizer_type} ({error}). "
            f"NullTokenizer takes ids with one blank between them: 17 4 256."
        ) from None
    beyond = next((i for i in ids if not 0 <= i < loaded.args.padded_vocab_size), None)
    if beyond is not None:
        raise UltraMemError(
            f"{what} {text!r:.80} has the id {beyond}; the model's vocabulary goes from 0 to "
            f"{loaded.args.padded_vocab_size - 1}. Use the tokenizer that the model was trained "
            f"with (--tokenizer-model)."
        )
    return ids
