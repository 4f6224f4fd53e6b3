"""The commands of ultramem_megatron/data/README.md, run as they stand, on files made for them."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests import ROOT
from ultramem_megatron.data import prepare

README = (ROOT / "ultramem_megatron" / "data" / "README.md").read_text()


def test_its_commands_prepare_what_they_say(tmp_path: Path) -> None:
    commands = [line for line in README.splitlines() if line.startswith("ultramem data prepare")]
    assert len(commands) == 2
    texts = [f"Document {i} has {i * i} words, or {i % 9}.\n" * 5 for i in range(300)]
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    for number, text in enumerate(texts):
        (tmp_path / "corpus" / "deep" / f"{number:03}.txt").write_text(text)
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in commands:
        words = [sys.executable, "-m", "ultramem_megatron", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    from_files, from_lines = (prepare.load(tmp_path / name) for name in ("data", "data-lines"))
    assert from_files is not None
    assert from_lines is not None
    assert from_files.documents == from_lines.documents == len(texts)
    for name in ("train.bin", "train.idx", "valid.bin", "tokenizer/tokenizer.json"):
        found = [(tmp_path / folder / name).read_bytes() for folder in ("data", "data-lines")]
        assert found[0] == found[1], name


def test_what_trains_is_named_as_it_is_made() -> None:
    for word in ("data/tokenizer", "data/train", "data/valid", prepare.MANIFEST):
        assert word in README
