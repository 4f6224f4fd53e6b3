"""What the documents say can be followed: links lead somewhere, names are there, commands run."""

import ast
import itertools
import re
from pathlib import Path

import pytest

from tests import ROOT
from tests.documents import (
    INFO,
    Block,
    anchors,
    blocks,
    documents,
    links,
    open_checkout,
    prose,
    read,
    run,
)
from tests.house import file_of, named

_NOW = [name for name in documents() if name != "CHANGELOG.md"]
"""Those about the present; the changelog names what was."""
_BLOCKS = [block for document in documents() for block in blocks(document)]
_QUICK = [block for block in _BLOCKS if block.info == "bash"]
_SLOW = sorted({block.document for block in _BLOCKS if block.info == "bash slow"})


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return open_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.mark.parametrize("document", documents())
def test_links_lead_somewhere(document: str) -> None:
    assert [link for link in links(document) if not _leads_somewhere(document, link)] == []


def _leads_somewhere(document: str, link: str) -> bool:
    file, _, anchor = link.partition("#")
    target = (ROOT / document).parent / file if file else ROOT / document
    if not anchor:
        return target.exists()
    return target.is_file() and anchor in anchors(str(target.resolve().relative_to(ROOT)))


@pytest.mark.parametrize("document", documents())
def test_every_block_says_what_it_is(document: str) -> None:
    assert [block.name for block in blocks(document) if block.info not in INFO] == []
    # A block by indentation would be neither run nor marked as not to be run.
    lines = prose(document).split("\n")
    assert [number for number, line in enumerate(lines, 1) if line.startswith("    ")] == []


@pytest.mark.parametrize("document", _NOW)
def test_names_of_ours_are_there(document: str) -> None:
    words = re.findall(r"`(ultramem_megatron(?:\.\w+)+)`", prose(document))
    imports = (named(b.text, "") for b in blocks(document) if b.info == "python")
    ours = [name for name in itertools.chain(words, *imports) if name.startswith("ultramem_meg")]
    assert [name for name in ours if not _is_there(name)] == []
    paths = re.findall(r"`((?:\w+/)+[\w.]+\.(?:py|sh|md|sbatch|csv))`", prose(document))
    here = [ROOT / document, ROOT, ROOT / "ultramem_megatron"]
    homes = [here[0].parent, *here[1:]]
    assert [path for path in paths if not any((home / path).exists() for home in homes)] == []


def _is_there(name: str) -> bool:
    """Whether a dotted name is a module or folder of ours, or is defined or imported in one."""
    folder = name.removeprefix("ultramem_megatron.").replace(".", "/")
    if file_of(name) or (ROOT / folder).is_dir():
        return True
    module, _, last = name.rpartition(".")
    file = file_of(module)
    if file is None:
        return False
    nodes = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    return any(last in (getattr(node, "name", None), getattr(node, "id", None)) for node in nodes)


@pytest.mark.parametrize("block", [b for b in _BLOCKS if b.info == "python"], ids=lambda b: b.name)
def test_code_compiles(block: Block) -> None:
    compile(block.text, block.name, "exec")


@pytest.mark.parametrize("block", _QUICK, ids=lambda block: block.name)
def test_a_quick_command_runs(block: Block, checkout: Path) -> None:
    done = run(block.text, checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    after = [b for b in blocks(block.document) if b.line > block.line][:1]
    if after and after[0].info == "text output":
        assert done.stdout.rstrip() == after[0].text.rstrip()


@pytest.fixture(scope="module")
def after_the_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the quickstart ran, at its tiny size."""
    folder = open_checkout(tmp_path_factory.mktemp("checkout"))
    words = ["the", "memory", "holds", "values", "and", "each", "value", "has", "two", "keys"]
    lines = (" ".join(words[i * j % 10] for j in range(1, 9)) for i in range(1, 600))
    (folder / "words.txt").write_text("".join(f"{i}. {line}.\n\n" for i, line in enumerate(lines)))
    train = "python -m launch.quickstart --tiny --steps 6 --output runs/quickstart"
    done = run(f"{train} --text words.txt", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.long
@pytest.mark.parametrize("document", _SLOW)
def test_long_commands_run_one_after_the_other(document: str, after_the_quickstart: Path) -> None:
    slow = [block for block in blocks(document) if block.info == "bash slow"]
    done = run("".join(f"echo == {b.name}\n{b.text}" for b in slow), after_the_quickstart)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_outputs_follow_a_command_that_is_run() -> None:
    for document in documents():
        for before, block in itertools.pairwise(blocks(document)):
            if block.info == "text output":
                assert before.info == "bash", block.name


def test_a_folder_s_readme_names_its_folders() -> None:
    missing = []
    for document in documents():
        folder = (ROOT / document).parent
        if folder == ROOT or not document.endswith("README.md"):
            continue
        inner = {path.parent for path in folder.glob("*/*") if path.suffix in (".py", ".sh")}
        missing += [
            f"{document}: {path.name}/" for path in inner if f"{path.name}/" not in read(document)
        ]
    assert missing == []


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = "bash tests/run.sh"
    assert command in read("README.md")
    assert f"check {command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_licence_is_the_one_that_is_declared() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
