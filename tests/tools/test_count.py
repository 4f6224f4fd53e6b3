"""`ultramem count`: reads of each row, and batches that read it, against a plain count."""

import numpy as np
import pytest
import torch

from tests.decoding import random_model
from tests.ranks import RanksFailed, run_on_ranks
from tests.training_runs import make_saving_fast
from ultramem_megatron.data import indexed
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.background_reads import read_background
from ultramem_megatron.tools.count import main

_LENGTH, _WINDOWS = 32, 3  # of the model; of a batch
_SIZES = (230, 40)  # tokens of two data sets: 8 and 2 windows, so 3 and 1 batches


@pytest.fixture(scope="module", params=["ultramem-conv", "ultramemv2"])
def files(request, tmp_path_factory):
    """A checkpoint, two data sets, its design and what a plain count finds."""
    folder = tmp_path_factory.mktemp(request.param)
    generator = np.random.default_rng(0)
    streams = [generator.integers(0, 512, size) for size in _SIZES]
    for number, stream in enumerate(streams):
        indexed.write(folder / f"data{number}", [stream.tolist()], 512)
    return folder, *run_on_ranks(1, _save_and_count, folder, request.param, streams)[0]


def _save_and_count(folder, kind, streams):
    """Save a model; its design, and by table a row for each window's reads."""
    from ultramem_megatron.megatron.checkpoint.weights import save_weights
    from ultramem_megatron.megatron.flags.arguments import config_from_args
    from ultramem_megatron.memory.layer import memory_layers
    from ultramem_megatron.tools.evaluate.perplexity import causal_mask

    make_saving_fast()
    model, args = random_model(kind)
    save_weights(model, args, folder / "checkpoint")
    layers = list(memory_layers(model.train()))  # which counts what it reads
    for layer in layers:
        layer.statistics.count_rows(torch.device("cpu"))
    batches = []
    for stream in streams:
        read = stream[:-1]  # the last token is only predicted
        pieces = [read[start : start + _LENGTH] for start in range(0, len(read), _LENGTH)]
        for first in range(0, len(pieces), _WINDOWS):
            for piece in pieces[first : first + _WINDOWS]:
                tokens = torch.from_numpy(piece)[None]
                positions = torch.arange(len(piece))[None]
                model(tokens, positions, causal_mask(len(piece), torch.device("cpu")))
            found = {}
            for layer in layers:
                reads = layer.statistics.take_rows()
                found[layer.table_number] = found.get(layer.table_number, 0) + reads
            batches.append(found)
    return config_from_args(args), {n: torch.stack([b[n] for b in batches]) for n in batches[0]}


def _count(folder, *words, data=("data0", "data1")):
    prefixes = [str(folder / name) for name in data]
    words = ("--batch-size", str(_WINDOWS), "--out", str(folder / "reads.npz"), *words)
    main(["--load", str(folder / "checkpoint"), "--data", *prefixes, *words])


_ALONE = ["--tensor-model-parallel-size", "1", "--ultramem-partition", "number"]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, []),
        pytest.param(2, [], marks=pytest.mark.long),
        pytest.param(2, _ALONE, marks=pytest.mark.long),
        pytest.param(4, [*_ALONE, "--ultramem-parallel-size", "2"], marks=pytest.mark.long),
    ],
)
def test_every_read_is_counted_once(files, ranks, words):
    folder, config, expected = files
    run_on_ranks(ranks, _count, folder, *words)
    found = read_background(str(folder / "reads.npz"), config)
    assert found.batches == 4
    assert found.tables.keys() == expected.keys()
    for number, table in found.tables.items():
        assert torch.equal(table.reads, expected[number].sum(0))
        assert torch.equal(table.batches, (expected[number] > 0).sum(0))
        assert 0 < table.batches.float().mean() < 4


@pytest.mark.long
def test_some_of_the_batches(files):
    folder, config, expected = files
    run_on_ranks(1, _count, folder, "--max-batches", "2")
    found = read_background(str(folder / "reads.npz"), config)
    assert found.batches == 2
    for number, table in found.tables.items():
        assert torch.equal(table.reads, expected[number][:2].sum(0))


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UltraMemError, match=f"--out {tmp_path}: is a folder"):
        main(["--load", "/nowhere", "--data", "/nowhere", "--out", str(tmp_path)])


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "0"], "--batch-size is 0; it must be a whole number"),
        (["--max-batches", "0"], "--max-batches is 0; it must be a whole number"),
        (["--out", "/nowhere/reads.npz"], "--out /nowhere/reads.npz: its folder is not there"),
        (["--load", "/nowhere"], "/nowhere"),
        (["--data", "/nowhere"], r"/nowhere\.idx: No such file or directory"),
    ],
)
def test_what_cannot_be_counted_is_refused(files, words, message):
    with pytest.raises(RanksFailed, match=message):
        run_on_ranks(1, _count, files[0], *words)


def _save_dense(folder):
    from ultramem_megatron.megatron.checkpoint.weights import save_weights

    make_saving_fast()
    model, args = random_model("dense")
    save_weights(model, args, folder / "dense")


@pytest.mark.long
def test_a_model_without_memories_is_refused(files):
    run_on_ranks(1, _save_dense, files[0])
    with pytest.raises(RanksFailed, match="no memory layers: nothing to count"):
        run_on_ranks(1, _count, files[0], "--load", str(files[0] / "dense"))
