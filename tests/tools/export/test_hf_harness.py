"""lm-evaluation-harness's own `hf` model on an exported folder scores as our adapter does."""

import importlib.util
import types

import pytest

from tests import ROOT
from tests.ranks import run_on_ranks
from tests.tools.export.models import MODELS, flags, shaken
from tests.training_runs import make_saving_fast

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed"
    ),
]
_PAIRS = [
    ("A memory layer", " reads few values"),
    ("The tree", " is"),
    ("", "one"),
    ("Whatever is fast answers to a plain float64 reference of the whole layer" * 2, " and"),
]
_TEXTS = [
    "a text",
    "Whatever is fast answers to a plain float64 reference of the whole layer. " * 3,
]
_PROMPTS = ["A memory", "On CPUs every feature is"]


def _requests(*all_arguments):
    return [types.SimpleNamespace(args=arguments) for arguments in all_arguments]


def _answers(model):
    """Scores of continuations and of whole texts, and greedy continuations."""
    options = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    return (
        [score for score, _ in model.loglikelihood(_requests(*_PAIRS), disable_tqdm=True)],
        [greedy for _, greedy in model.loglikelihood(_requests(*_PAIRS), disable_tqdm=True)],
        model.loglikelihood_rolling(_requests(*((text,) for text in _TEXTS)), disable_tqdm=True),
        model.generate_until(
            _requests(*((prompt, options) for prompt in _PROMPTS)), disable_tqdm=True
        ),
    )


def _both(folder):
    from lm_eval.models.huggingface import HFLM

    from ultramem_megatron.data.tokenizer import save, train
    from ultramem_megatron.inference.loading import load_for_inference
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.megatron.checkpoint.weights import save_weights
    from ultramem_megatron.tools.evaluate.harness import HarnessModel
    from ultramem_megatron.tools.export.__main__ import main

    make_saving_fast()
    save(train([(ROOT / "README.md").read_text()], 400), folder / "tokenizer")
    model, args = untrained_model(flags(MODELS["convolution"]))
    shaken(model)
    model.output_layer.weight.data[400:] = 0
    args.tokenizer_type = "HuggingFaceTokenizer"
    args.tokenizer_model = str(folder / "tokenizer")
    save_weights(model, args, folder / "checkpoint")
    main(["--load", f"{folder}/checkpoint", "--to", "hf", f"{folder}/hf"])
    ours = HarnessModel(load_for_inference(str(folder / "checkpoint")), batch=2)
    theirs = HFLM(pretrained=str(folder / "hf"), trust_remote_code=True, batch_size=2, device="cpu")
    return _answers(ours), _answers(theirs)


def test_the_harness_gives_the_numbers_of_our_adapter(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    ((ours, theirs),) = run_on_ranks(1, _both, tmp_path)
    for found, wanted in zip(theirs[:3], ours[:3], strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    assert theirs[3] == ours[3]
    assert all(ours[3])
