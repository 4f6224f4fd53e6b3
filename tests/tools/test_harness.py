"""The model as lm-evaluation-harness asks it, against logits of whole forward passes.

Without lm_eval, the part of its interface that the adapter builds upon is stood in for.
"""

import contextlib
import importlib.util
import io
import sys
import types

import pytest
import torch

from tests.decoding import LOGITS, NumberTokenizer, full_logits, random_model
from tests.ranks import run_on_ranks
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.evaluate.generation import generation_from
from ultramem_megatron.tools.evaluate.windows import rolling_windows

_POSITIONS = 32


class _LossyTokenizer(NumberTokenizer):
    """Decoded and encoded again, an odd token is another one."""

    def detokenize(self, tokens, **_):
        return " ".join(str(token // 2 * 2) for token in tokens)


def _stand_in():
    class TemplateLM:
        def loglikelihood(self, requests, disable_tqdm=False):
            encoded = []
            for request in requests:
                context, continuation = request.args
                before = self.tok_encode(context) if context else [self.eot_token_id]
                encoded.append((request.args, before, self.tok_encode(continuation)))
            return self._loglikelihood_tokens(encoded)

    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api")}
    modules["lm_eval.api.model"] = types.SimpleNamespace(TemplateLM=TemplateLM)
    sys.modules.update(modules)


def _asked():
    """A harness model, and its GPT for the plain way."""
    if importlib.util.find_spec("lm_eval") is None:
        _stand_in()
    from ultramem_megatron.inference.loading import LoadedModel
    from ultramem_megatron.tools.evaluate.harness import HarnessModel

    model, args = random_model("ultramem-conv")
    model.eval()
    return HarnessModel(LoadedModel(model, _LossyTokenizer(), args), batch=2), model


def _request(*args):
    return types.SimpleNamespace(args=args)


def _log_probability(model, context, continuation):
    whole = torch.tensor([*context, *continuation])
    assert len(whole) <= _POSITIONS + 1
    logs = full_logits(model, whole[:-1].unsqueeze(0))[0].double().log_softmax(-1)
    count = len(continuation)
    return float(logs[-count:].gather(1, whole[-count:, None]).sum())


def _greedy(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(full_logits(model, torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] == _LossyTokenizer.eod:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


def _generated():
    """Texts by the harness model, and the plain ones, of prompts of several lengths and options."""
    harness, model = _asked()
    cases = [
        (list(range(41, 46)), {"max_gen_toks": 6}, 6),
        ([3, 5, 7], {"max_gen_toks": 6}, 6),
        ([9], {"max_new_tokens": 6, "until": None}, 6),
        ([3, 5, 7], {"max_gen_toks": 4, "do_sample": False, "temperature": 0.7, "top_p": 0.5}, 4),
        ([3, 5, 7], {"max_gen_toks": 4, "do_sample": True, "temperature": 1, "top_k": 1}, 4),
        ([3, 5, 7], {"max_gen_toks": 4, "temperature": 1e-4, "top_k": 10**6}, 4),
        ([3, 5, 7], {"max_gen_toks": 4, "temperature": 0.8, "top_p": 1e-6}, 4),
        ([3, 5, 7], {"max_length": 8}, 5),
        # No room for what is asked: the prompt is kept whole.
        (list(range(71, 91)), {}, _POSITIONS - 20),
        (list(range(71, 91)), {"max_gen_toks": 99, "until": []}, _POSITIONS - 20),
        ([], {"max_gen_toks": 3}, 3),
    ]
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        texts = harness.generate_until(
            [_request(" ".join(map(str, prompt)), options) for prompt, options, _ in cases]
        )
    plain = [_greedy(model, prompt or [harness.eot_token_id], count) for prompt, _, count in cases]
    return texts, [_LossyTokenizer().detokenize(tokens) for tokens in plain], told.getvalue()


def test_generation_continues_the_whole_prompt_as_token_ids():
    ((texts, plain, told),) = run_on_ranks(1, _generated)
    for number, (text, expected) in enumerate(zip(texts, plain, strict=True)):
        assert text == expected, number
    assert "2 of 11 continuations get less room" in told
    assert "down to 12 of 256 tokens, after a prompt of 20 in 32 positions" in told


def _stopped():
    harness, model = _asked()
    text = _LossyTokenizer().detokenize(_greedy(model, [3, 5, 7], 6)).split()
    rounds = [{"until": text[3]}, {"until": ["none", text[4], text[2]]}, {"until": ["", text[0]]}]
    requests = [_request("3 5 7", {"max_gen_toks": 6, **options}) for options in rounds]
    sampled = [_request("3 5 7", {"max_gen_toks": 8, "temperature": 1.0})] * 6
    return text, harness.generate_until(requests), harness.generate_until(sampled)


def test_stop_strings_cut_and_repetitions_differ():
    ((text, cut, sampled),) = run_on_ranks(1, _stopped)
    whole = " ".join(text)
    first = [min(whole.index(stop) for stop in stops) for stops in ([text[3]], [text[4], text[2]])]
    assert cut[:2] == [whole[: first[0]], whole[: first[1]]]
    assert cut[2] == ""
    assert len(set(sampled)) == 6


def _scored():
    harness, model = _asked()
    text = list(range(40, 120))
    choices = [("3 4 5", " 6 7"), ("", "9 8"), (" ".join(map(str, range(1, 60))), " 60 61")]
    plain = [([3, 4, 5], [6, 7]), ([511], [9, 8]), (range(29, 60), [60, 61])]
    windows = [
        ([511], text[:32]),
        ([text[31]], text[32:64]),
        (text[80 - 33 : 64], text[64:]),  # the last has all the context there is room for
    ]
    texts = [" ".join(map(str, text)), "7"]
    return (
        [score for score, _ in harness.loglikelihood([_request(*pair) for pair in choices])],
        [_log_probability(model, *pair) for pair in plain],
        harness.loglikelihood_rolling([_request(text) for text in texts]),
        [
            sum(_log_probability(model, *window) for window in windows),
            _log_probability(model, [511], [7]),
        ],
    )


def test_scores_are_sums_over_logits():
    ((choices, plain, rolling, rolled),) = run_on_ranks(1, _scored)
    assert choices == pytest.approx(plain, rel=LOGITS)
    assert rolling == pytest.approx(rolled, rel=LOGITS)


def _refused():
    harness, _ = _asked()
    long = " ".join(map(str, range(_POSITIONS)))
    calls = [
        lambda: harness.generate_until([_request(long, {"max_gen_toks": 5})]),
        lambda: harness.generate_until([_request("1 2 3", {"max_length": 3})]),
        lambda: harness.loglikelihood([_request("1", f" {long} 8")]),
    ]
    messages = []
    for call in calls:
        with pytest.raises(UltraMemError) as refused:
            call()
        messages.append(str(refused.value))
    return messages


def test_what_has_no_room_is_refused_with_both_numbers():
    ((prompt, total, continuation),) = run_on_ranks(1, _refused)
    assert "has 32 tokens" in prompt
    assert "has 32 positions, the task asks for 5 new ones" in prompt
    assert "has 3 tokens, and no new one fits into 3" in total
    assert "has 33 tokens, the model 32 positions" in continuation


_SAME = [
    {},
    {"until": "\n"},
    {"until": None, "max_tokens": 7},
    {"max_completion_tokens": 3, "max_new_tokens": 5, "until": ["a", "b"]},
    {"max_gen_toks": 1, "max_new_tokens": 5},
    {"do_sample": False, "temperature": 0.9},
    {"temperature": 0.9},
    {"do_sample": True, "temperature": 0.5, "top_k": 5},
]


@pytest.mark.parametrize("options", _SAME)
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_options_mean_what_they_mean_to_the_harness(options):
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    theirs, ours = normalize_gen_kwargs(options), generation_from(options)
    assert ours.new_tokens == theirs["max_gen_toks"]
    assert ours.temperature == theirs.get("temperature", 0.0)
    assert (ours.temperature > 0) == theirs["do_sample"]
    until = [stop for stop in theirs["until"] if stop is not None]
    assert list(ours.until) == handle_stop_sequences(until, eos=None)


@pytest.mark.parametrize(("tokens", "length"), [(0, 4), (3, 4), (4, 4), (5, 4), (80, 32), (9, 1)])
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_windows_are_those_of_the_harness(tokens, length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    theirs = get_rolling_token_windows(list(range(tokens)), 511, length, context_len=1)
    assert list(rolling_windows(range(tokens), 511, length)) == list(
        map(make_disjoint_window, theirs)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, r"num_beams is 4; it must be left out: known are until, max_gen_toks"),
        ({"do_sample": True}, r"temperature is 0\.0; it must be above 0 with do_sample"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0; it must be above 0"),
        ({"temperature": 1, "top_k": 5, "top_p": 0.9}, "top_k is 5; it must be 0 where top_p"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0; it must be a whole number >= 1"),
    ],
)
def test_options_that_cannot_be_met_are_refused_by_name(options, message):
    with pytest.raises(UltraMemError, match=message):
        generation_from(options)
    assert generation_from({"num_beams": 1, "repetition_penalty": 1.0}) == generation_from({})
