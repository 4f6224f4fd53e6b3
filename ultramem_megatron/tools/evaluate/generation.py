"""What a generation task of lm-evaluation-harness asks for, with the meaning the harness gives it.

Source: `normalize_gen_kwargs` and `HFLM.generate_until` of lm_eval 0.4.13. Two things differ. The
prompt is kept and the continuation made shorter, where the harness cuts the prompt to let the
continuation have its length: with its default of 256 tokens a model of 256 positions would see
nothing of a task. And options that we do not have are refused, where `hf` hands them on.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ultramem_megatron.errors import UltraMemError

_DEFAULT_NEW_TOKENS = 256
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of one setting; of several, the first counts."""
_WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}
"""Other options that may be given, with the only value they may have."""


class Generation(NamedTuple):
    """The settings of a request."""

    new_tokens: int
    total: int | None
    """Tokens of prompt and continuation together, in place of new_tokens."""
    temperature: float
    """0: the likeliest token is taken."""
    top_k: int
    top_p: float
    until: tuple[str, ...]

    def length_after(self, prompt: int, positions: int) -> int:
        """New tokens after a prompt of so many, in a model of so many positions.

        Raises UltraMemError if there is no room for one.
        """
        asked = self.new_tokens if self.total is None else self.total - prompt
        limit = positions if self.total is None else min(positions, self.total)
        if prompt >= limit:
            raise UltraMemError(
                f"A prompt of the task has {prompt} tokens, and no new one fits into {limit} (the "
                f"model has {positions} positions, the task asks for {max(asked, 1)} new ones). "
                f"Use fewer examples in the prompt, a shorter task or a model of more positions."
            )
        return min(asked, positions - prompt)

    def cut(self, text: str) -> str:
        """What comes before the first of the strings to stop at."""
        for stop in filter(None, self.until):
            text = text.partition(stop)[0]
        return text


def generation_from(options: Mapping[str, Any]) -> Generation:
    """The settings in a request's generation_kwargs. Raises UltraMemError, naming the option."""
    left = {name: value for name, value in options.items() if value is not None}
    until = left.pop("until", [])
    lengths = [left.pop(name) for name in _NEW_TOKENS if name in left]
    total = left.pop("max_length", None)
    temperature = _temperature(left.pop("temperature", 0.0), left.pop("do_sample", None))
    top_k, top_p = left.pop("top_k", 0), left.pop("top_p", 1.0)
    for name, value in left.items():
        if name not in _WITHOUT_EFFECT or value != _WITHOUT_EFFECT[name]:
            raise _refusal(name, value, f"left out: known are {', '.join(_known())}")
    return Generation(
        _whole("max_gen_toks", lengths[0] if lengths else _DEFAULT_NEW_TOKENS),
        None if total is None else _whole("max_length", total),
        temperature,
        *_restrictions(top_k, top_p, temperature),
        (until,) if isinstance(until, str) else tuple(until),
    )


def _temperature(temperature: Any, do_sample: bool | None) -> float:
    """0 where the likeliest token is to be taken: unless do_sample, or it alone, says otherwise."""
    if do_sample is False:
        return 0.0
    found = float(temperature)
    if found < 0 or (do_sample and found == 0):
        raise _refusal("temperature", temperature, "above 0 with do_sample")
    return found


def _restrictions(top_k: Any, top_p: Any, temperature: float) -> tuple[int, float]:
    """top_k (0: none) and top_p (1: none); of no effect without sampling."""
    if temperature == 0:
        return 0, 1.0
    k, p = max(int(top_k), 0), float(top_p)
    if not 0 < p <= 1:
        raise _refusal("top_p", top_p, "above 0 and at most 1")
    if k and p < 1:
        raise _refusal("top_k", top_k, "0 where top_p is below 1: the engine takes one of the two")
    return k, p


def _whole(name: str, value: Any) -> int:
    if int(value) < 1:
        raise _refusal(name, value, "a whole number >= 1")
    return int(value)


def _known() -> tuple[str, ...]:
    return ("until", *_NEW_TOKENS, "max_length", "do_sample", "temperature", "top_k", "top_p")


def _refusal(name: str, value: Any, allowed: str) -> UltraMemError:
    return UltraMemError(
        f"generation_kwargs of the task: {name} is {value!r:.60}; it must be {allowed}."
    )
