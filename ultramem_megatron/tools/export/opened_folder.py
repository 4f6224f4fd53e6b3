"""A folder for transformers opened here, to be run: its model and tokenizer, by none of its code.

S sequence.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.export.hf.configuration_ultramem import UltraMemGPTConfig
from ultramem_megatron.tools.export.hf.modeling_ultramem import UltraMemGPTForCausalLM
from ultramem_megatron.tools.export.hf_folder import (
    check_sums,
    read_config,
    read_weights,
    with_weights,
)
from ultramem_megatron.tools.export.hf_tokenizer import has_tokenizer


class OpenedFolder(NamedTuple):
    """A model in evaluation mode, its tables mapped from their files, and its tokenizer."""

    model: UltraMemGPTForCausalLM
    tokenizer: Any
    """transformers', or None where the folder has none: a text is then ids, as 17 4 256."""

    def ids(self, text: str, what: str) -> list[int]:
        """Ids (S,) of a text. what: its flag, for the message. Raises UltraMemError."""
        if self.tokenizer is not None:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        else:
            ids = _numbers(text, what)
        vocabulary = self.model.config.vocab_size
        beyond = next((i for i in ids if not 0 <= i < vocabulary), None)
        if beyond is not None:
            raise UltraMemError(
                f"{what} {text!r:.80} has the id {beyond}; the model's vocabulary goes from 0 to "
                f"{vocabulary - 1}."
            )
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """What ids stand for."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        found: str = self.tokenizer.decode(ids)
        return found


def open_folder(folder: Path) -> OpenedFolder:
    """Open what `ultramem export --to hf` or `ultramem quantize` wrote. Raises UltraMemError."""
    _, config = read_config(folder, quantized=True)
    check_sums(folder)
    problem = f"The weights in {folder} do not fit config.json"
    model = with_weights(config, read_weights(folder, "cpu"), problem)
    model.generation_config = _generation_config(folder, model.generation_config)
    return OpenedFolder(model, _tokenizer(folder, config) if has_tokenizer(folder) else None)


def _generation_config(folder: Path, default: GenerationConfig) -> GenerationConfig:
    file = folder / "generation_config.json"
    if not file.is_file():
        return default
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UltraMemError(
            f"{file} cannot be read: {str(error).splitlines()[0]:.200}. Copy the folder again, or "
            f"remove the file."
        ) from error


def _tokenizer(folder: Path, config: UltraMemGPTConfig) -> Any:
    from transformers import AutoTokenizer

    try:
        # Given the config, transformers need not ask whether it may run the folder's code.
        return AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the libraries behind it have no exception in common
        raise UltraMemError(
            f"The tokenizer in {folder} cannot be opened: {str(error).splitlines()[0]:.200}. Copy "
            f"the folder again."
        ) from error


def _numbers(text: str, what: str) -> list[int]:
    try:
        return [int(word) for word in text.split()]
    except ValueError:
        raise UltraMemError(
            f"{what} {text!r:.80} is no list of ids, and the folder has no tokenizer to read it. "
            f"Give ids with blanks between them: 17 4 256."
        ) from None
