"""Preparing text: Megatron reads what was written, numbers are right, nothing half done is used."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ultramem_megatron.data import encode, indexed, prepare, tokenizer
from ultramem_megatron.errors import UltraMemError

VOCAB_SIZE = 400
SENTENCES = "".join(f"The {i}th naïve sentence, of {i * i} — <|endoftext|>\n" for i in range(700))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("source") / "text.txt"
    file.write_text(SENTENCES, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def output(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare.prepare(source, folder, VOCAB_SIZE)
    return folder


def megatron_tokenizer(folder: Path):
    """The tokenizer as Megatron makes it from its flags."""
    from megatron.core.tokenizers import MegatronTokenizer

    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(folder), metadata_path={"library": "huggingface"}
    )


def read_part(folder: Path, part: str) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(folder / part))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_megatron_reads_back_the_text(output: Path) -> None:
    reader = megatron_tokenizer(output / "tokenizer")
    documents = read_part(output, "train") + read_part(output, "valid")
    assert all(document[-1] == reader.eod for document in documents)
    assert all(reader.eod not in document[:-1] for document in documents)  # though it is spelled
    restored = "".join(reader.detokenize(document[:-1]) for document in documents)
    assert sorted(restored.splitlines()) == sorted(SENTENCES.splitlines())


def test_tokenizer_round_trip_of_any_text(output: Path) -> None:
    reader = megatron_tokenizer(output / "tokenizer")
    unseen = "  def f(x):\n\treturn '日本語 🙂'  # , . !\n\n"
    assert reader.detokenize(reader.tokenize(unseen)) == unseen


def test_manifest_states_the_unigram_entropies(output: Path) -> None:
    manifest = json.loads((output / prepare.MANIFEST).read_text())
    train = Counter(token for document in read_part(output, "train") for token in document)
    valid = Counter(token for document in read_part(output, "valid") for token in document)
    both, total = train + valid, (train + valid).total()
    entropy = -sum(n / total * math.log(n / total) for n in both.values())
    smoothed = train.total() + manifest["vocab_size"]
    cross = -sum(n * math.log((train[t] + 1) / smoothed) for t, n in valid.items()) / valid.total()
    assert manifest["unigram_entropy"] == pytest.approx(entropy, rel=1e-12)
    assert manifest["unigram_cross_entropy_valid"] == pytest.approx(cross, rel=1e-12)
    assert (manifest["train_tokens"], manifest["valid_tokens"]) == (train.total(), valid.total())
    assert manifest["vocab_size"] == VOCAB_SIZE
    assert manifest["text_bytes"] == len(SENTENCES.encode())
    share = manifest["valid_tokens"] / total
    assert 0.03 < share < 0.07


def test_entropy_of_known_distributions() -> None:
    assert prepare.unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert prepare.unigram_entropy(np.array([7, 0])) == 0.0
    train, valid = np.array([2, 0]), np.array([1, 1])
    expected = -(math.log(3 / 4) + math.log(1 / 4)) / 2
    assert prepare.unigram_cross_entropy(train, valid) == pytest.approx(expected)


def test_same_text_gives_the_same_bytes(source: Path, output: Path, tmp_path: Path) -> None:
    prepare.prepare(source, tmp_path / "again", VOCAB_SIZE)
    for name in json.loads((output / prepare.MANIFEST).read_text())["sizes"]:
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes(), name


def test_second_preparation_does_nothing(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr(tokenizer, "train", fail)
    assert prepare.prepare(source, output, VOCAB_SIZE) == prepare.load(output)


@pytest.mark.parametrize("change", ["vocabulary", "text", "truncated", "deleted"])
def test_whatever_changed_is_prepared_again(
    source: Path, output: Path, tmp_path: Path, change: str
) -> None:
    folder, file, vocab_size = tmp_path / "data", tmp_path / "text.txt", VOCAB_SIZE
    shutil.copytree(output, folder)
    shutil.copy(source, file)
    if change == "vocabulary":
        vocab_size += 1
    elif change == "text":
        file.write_text(SENTENCES.replace("699th", "799th"), encoding="utf-8")
    elif change == "truncated":
        (folder / "train.bin").write_bytes((output / "train.bin").read_bytes()[:-2])
    else:
        (folder / "tokenizer" / "tokenizer.json").unlink()
    before = (folder / prepare.MANIFEST).stat().st_mtime_ns
    prepared = prepare.prepare(file, folder, vocab_size)
    assert (folder / prepare.MANIFEST).stat().st_mtime_ns != before
    assert prepare.load(folder) == prepared


def test_interrupted_preparation_leaves_the_old_one_and_is_redone(
    source: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(output, folder)
    before = prepare.load(folder)
    with monkeypatch.context() as patched:
        patched.setattr(indexed, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(source, folder, VOCAB_SIZE + 1)
    assert prepare.load(folder) == before
    assert prepare.prepare(source, folder, VOCAB_SIZE + 1).vocab_size == VOCAB_SIZE + 1
    assert not list(folder.glob(".unfinished-*"))


def test_folder_of_someone_else_is_not_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UltraMemError, match=r"--output .* was not made by this command"):
        prepare.prepare(source, tmp_path, VOCAB_SIZE)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 257}, "--vocab-size 257: must be at least 258"),
        ({"vocab_size": 99999999999}, "--vocab-size 99999999999: must be at least 258"),
        ({"vocab_size": -5}, "--vocab-size -5: must be at least 258"),
        ({"text": ""}, "argument --text: is empty; '.' is the current folder"),
        ({"output": ""}, "argument --output: is empty"),
        ({"vocab_size": "many"}, "argument --vocab-size: invalid int value: 'many'"),
        ({"text": "nowhere"}, "--text nowhere: no such file or folder"),
        ({"rest": ["--workers", "0"]}, "--workers 0: must be at least 1"),
        ({"output": "caf\udce9"}, "--output caf\\xe9: the name is not UTF-8"),
        ({"rest": ["--json-key", "text"]}, "text.txt, line 1 is not JSON in UTF-8"),
    ],
)
def test_command_line_reports_bad_input_in_one_line(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: dict[str, object],
    message: str,
) -> None:
    defaults = {"text": source, "vocab_size": VOCAB_SIZE, "output": tmp_path / "x", "rest": []}
    given = SimpleNamespace(**{**defaults, **arguments})
    status = prepare.main(
        [
            "--text",
            str(given.text),
            "--output",
            str(given.output),
            "--vocab-size",
            str(given.vocab_size),
            *given.rest,
        ]
    )
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


def test_any_number_of_processes_gives_the_same_bytes(
    source: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "WORTH", 1000)
    monkeypatch.setattr(encode, "BATCH", 2000)  # several for each process
    prepare.prepare(source, tmp_path / "data", VOCAB_SIZE, workers=3)
    for name in json.loads((output / prepare.MANIFEST).read_text())["sizes"]:
        assert (tmp_path / "data" / name).read_bytes() == (output / name).read_bytes(), name


def test_a_killed_process_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "WORTH", 1000)
    monkeypatch.setattr(encode, "BATCH", 500)  # many: some are handed out after the kill
    in_order = encode._in_order

    def kill_one(pool, *rest):
        batches = in_order(pool, *rest)
        yield next(batches)
        os.kill(next(iter(pool._processes)), signal.SIGKILL)
        while not pool._broken:  # the other process may be fast, and the news slow
            time.sleep(0.01)
        yield from batches

    monkeypatch.setattr(encode, "_in_order", kill_one)
    with pytest.raises(UltraMemError, match=r"one of 2 processes .* Give fewer --workers"):
        prepare.prepare(source, tmp_path / "data", VOCAB_SIZE, workers=2)
    assert [item.name for item in (tmp_path / "data").iterdir()] == [".data.lock"]


def test_killed_from_outside_no_process_stays_and_the_next_call_goes_through(
    tmp_path: Path,
) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "data"
    text.write_text("".join(f"{i * i} words in line {i}, {i % 97}.\n" for i in range(330_000)))
    command = [sys.executable, "-m", "ultramem_megatron", "data", "prepare", "--workers", "2"]
    command += ["--vocab-size", "300", "--text", str(text), "--output", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "documents to train.bin ..." not in process.stdout.readline():
            assert process.poll() is None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_for(lambda: len(children.read_text().split()) >= 3)  # two, and the resource tracker
        workers = children.read_text().split()
        process.kill()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    assert prepare.load(folder) is None
    text.write_text(SENTENCES)
    assert prepare.prepare(text, folder, VOCAB_SIZE).text_bytes == len(SENTENCES.encode())
    assert not list(folder.glob(".unfinished-*"))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_memory_stays_small_whatever_the_size(tmp_path: Path) -> None:
    """A corpus of 100 MB; what is held of it is less."""
    text = tmp_path / "text.txt"
    line = "".join(f"{i * i} words in line {i}, {i % 97}.\n" for i in range(20_000))
    text.write_text(line * (100_000_000 // len(line)))
    script = (
        "import resource; from pathlib import Path\n"
        "from ultramem_megatron.data import spool, collect\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"before = peak(); file = open({str(tmp_path / 'spool')!r}, 'w+b')\n"
        "spooled = spool.Spool(file)\n"
        f"collect.collect(Path({str(text)!r}), None, Path('none'), spooled); file.flush()\n"
        "documents = spool.cut(file.fileno(), spooled, 1)\n"
        "assert sum(len(text) for _, text in documents.texts()) > 9e7\n"
        "print((peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 60  # MB


def test_gpt_dataset_yields_samples(output: Path, tmp_path: Path) -> None:
    """Megatron's own dataset class accepts the files and shifts labels by one."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        blend=([str(output / "valid")], None),
        split="1",
        path_to_cache=str(tmp_path),
        tokenizer=megatron_tokenizer(output / "tokenizer"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    low = IndexedDataset(str(output / "valid"))
    indices = np.arange(len(low), dtype=np.int32)
    dataset = GPTDataset(low, str(output / "valid"), indices, 10, Split.valid, config)
    sample = dataset[0]
    assert sample["tokens"].shape == (32,)
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
