"""Trains a byte-level BPE tokenizer and saves it as a folder that Megatron loads offline.

Use the folder with `--tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER`.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ultramem_megatron.errors import UltraMemError

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|padding|>"  # never written; Megatron warns when padding shares another token's id
MIN_VOCAB_SIZE = 258  # every byte and the two tokens above: any text can then be encoded
MAX_VOCAB_SIZE = 1 << 20  # four times the largest in use; the library aborts for want of memory


def check_vocab_size(vocab_size: int) -> None:
    """Raises UltraMemError for a size that no vocabulary of ours can have."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise UltraMemError(
            f"--vocab-size {vocab_size}: must be at least {MIN_VOCAB_SIZE}, which is one entry "
            f"per byte and two special ones, and at most {MAX_VOCAB_SIZE}; 4096 to 32768 are usual."
        )


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns a byte-level BPE of at most `vocab_size` entries (fewer when the text has too few).

    Raises:
        UltraMemError: see `check_vocab_size`.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer` as a Hugging Face folder."""
    # Nothing is fetched here; without this a slow or absent network can delay the import.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_DOCUMENT,
        bos_token=END_OF_DOCUMENT,
        pad_token=PADDING,
        unk_token=END_OF_DOCUMENT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(folder))
