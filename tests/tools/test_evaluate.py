"""Perplexity and scores of continuations against sums over logits made one window at a time."""

import json

import numpy as np
import pytest
import torch

from tests.decoding import LOGITS, full_logits, random_model
from tests.ranks import RanksFailed, run_on_ranks
from tests.training_runs import make_saving_fast
from ultramem_megatron.data import indexed
from ultramem_megatron.tools.evaluate.windows import batches, count_windows

_LENGTH = 16


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint and a data set of 3 documents; 101 tokens, 7 windows, the last one short."""
    folder = tmp_path_factory.mktemp("evaluate")
    generator = np.random.default_rng(0)
    stream = generator.integers(0, 512, 101)
    documents = [stream[:40].tolist(), stream[40:41].tolist(), stream[41:].tolist()]
    indexed.write(folder / "data", documents, 512)
    expected = run_on_ranks(1, _save, folder, stream)[0]
    return folder, expected


def _save(folder, stream):
    """Save a model; the mean loss of the stream and some continuations, the plain way."""
    from ultramem_megatron.megatron.checkpoint.weights import save_weights

    make_saving_fast()
    model, args = random_model("ultramem-conv")
    save_weights(model, args, folder / "checkpoint")
    losses = []
    for start in range(0, 100, _LENGTH):
        piece = torch.from_numpy(stream[start : start + _LENGTH + 1]).unsqueeze(0)
        logs = full_logits(model, piece[:, :-1]).double().log_softmax(-1)
        losses += (-logs.gather(2, piece[:, 1:, None]))[0, :, 0].tolist()
    assert len(losses) == 100
    scores = [_plain_score(model, *pair) for pair in _PAIRS]
    return sum(losses) / 100, scores


_PAIRS = [([3, 4, 5], [6, 7]), ([9], [8]), ([1] * 20, [2, 3, 4, 5]), ([1, 2], list(range(40, 80)))]


def _plain_score(model, context, continuation):
    """Of at most the last 33 tokens, which is what the 32 positions allow."""
    whole = torch.tensor([*context, *continuation])[-33:]
    logs = full_logits(model, whole[:-1].unsqueeze(0))[0].double().log_softmax(-1)
    count = min(len(continuation), 32)
    return float(logs[-count:].gather(1, whole[-count:, None]).sum())


def _evaluate(folder, *words):
    from contextlib import redirect_stdout
    from io import StringIO

    from ultramem_megatron.tools.evaluate.__main__ import main

    printed = StringIO()
    with redirect_stdout(printed):
        main(["--load", str(folder / "checkpoint"), *words])
    return [json.loads(line) for line in printed.getvalue().splitlines() if line[0] == "{"]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ["--batch-size", "3"]),
        (2, []),
        (2, ["--tensor-model-parallel-size", "1", "--ultramem-partition", "number"]),
        (
            4,
            [
                "--tensor-parallel-size",
                "1",
                "--ultramem-partition",
                "dimension",
                "--batch-size",
                "2",
            ],
        ),
    ],
)
def test_perplexity_counts_every_token_once(files, ranks, words):
    folder, (loss, _) = files
    prefix = str(folder / "data")
    printed = run_on_ranks(
        ranks, _evaluate, folder, "--data", prefix, "--window", str(_LENGTH), *words
    )
    assert all(lines == [] for lines in printed[1:])
    (result,) = printed[0]
    assert (result["data"], result["window"], result["tokens"]) == (prefix, _LENGTH, 100)
    assert result["loss"] == pytest.approx(loss, rel=LOGITS)
    assert result["perplexity"] == pytest.approx(np.exp(loss), rel=loss * LOGITS)


@pytest.mark.parametrize("tokens", [2, 16, 17, 18, 33, 50])
def test_windows_predict_each_token_once(tokens):
    stream = np.arange(tokens, dtype=np.uint16)
    predicted = []
    for replica in range(3):
        for one in batches(stream, 16, 2, replica, 3):
            assert torch.equal(one.targets[one.counts], one.tokens[one.counts] + 1)
            predicted += one.targets[one.counts].tolist()
    assert sorted(predicted) == list(range(1, tokens))
    assert count_windows(tokens, 16) == -(-(tokens - 1) // 16)


def _scores(folder, batch):
    from ultramem_megatron.inference.loading import load_model
    from ultramem_megatron.tools.evaluate.scoring import continuation_scores

    model, _ = load_model(str(folder / "checkpoint"))
    greedy = full_logits(model, torch.tensor([[3, 4, 5]]))[0, -1].argmax().item()
    pairs = [*_PAIRS, ([3, 4, 5], [greedy])]
    return continuation_scores(model, pairs, 32, batch)


def test_continuations_are_scored(files):
    folder, (_, expected) = files
    for rank, batch in ((1, 2), (2, 8)):
        *scores, likeliest = run_on_ranks(rank, _scores, folder, batch)[-1]
        assert [score.log_probability for score in scores] == pytest.approx(expected, rel=LOGITS)
        assert not any(score.greedy for score in scores)
        assert likeliest.greedy


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], r"nowhere\.idx: No such file or directory"),
        (["--data", "{data}", "--window", "33"], r"--window 33 exceeds the model's 32 positions"),
        (["--data", "{large}"], r"holds token 600, the model's vocabulary has 512 entries"),
        (["--data", "{mixed}"], r"mixed\.bin has 202 bytes, its index mixed\.idx describes 6"),
        (["--data", "{empty}"], r"empty\.idx holds no documents"),
        (["--data", "{blank}"], r"blank\.bin is empty: all its documents are"),
        (["--data", "{single}"], r"--data \S*single: 1 token; give 2 at least"),
        ([], r"Give --data PREFIX for perplexity, or --tasks TASK"),
        (["--data", "x", "--batch-size", "0"], r"--batch-size is 0; it must be a whole number"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(files, words, message):
    folder = files[0]
    indexed.write(folder / "large", [[1, 600]], 1000)
    indexed.write(folder / "mixed", [[1, 2, 3]], 512)
    for name, documents in (("empty", []), ("blank", [[]]), ("single", [[1]])):
        indexed.write(folder / name, documents, 512)
    (folder / "mixed.bin").write_bytes((folder / "data.bin").read_bytes())
    names = ("data", "large", "mixed", "empty", "blank", "single")
    paths = {name: str(folder / name) for name in names}
    with pytest.raises(RanksFailed, match=message):
        run_on_ranks(1, _evaluate, folder, *(word.format(**paths) for word in words))
