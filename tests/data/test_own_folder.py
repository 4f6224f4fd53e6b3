"""Folders that commands fill: what others put there, beside it and behind links stays."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ultramem_megatron.data import prepare
from ultramem_megatron.data.own_folder import OwnFolder, remove, write_whole
from ultramem_megatron.errors import UltraMemError

VOCAB_SIZE = 300
TEXT = "".join(f"Sentence {i} says a little more than sentence {i // 2}.\n" for i in range(400))


def contents(folder: Path) -> dict[str, str]:
    """Every file and link below `folder`; what a link points to by its text."""
    return {
        item.relative_to(folder).as_posix(): (
            os.readlink(item) if item.is_symlink() else item.read_bytes().hex()
        )
        for item in sorted(folder.rglob("*"))
        if item.is_symlink() or item.is_file()
    }


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def prepared(text: Path, tmp_path: Path) -> Path:
    prepare.prepare(text, tmp_path / "data", VOCAB_SIZE)
    return tmp_path / "data"


MANIFESTS = {
    "a manifest of another program": '{"users": 1}',
    "half a manifest": '{"key": "',
    "a list": "[1, 2]",
    "a file outside": json.dumps({**dict.fromkeys(prepare.KEYS), "sizes": {"../text.txt": 1}}),
    "a file by its path": json.dumps({**dict.fromkeys(prepare.KEYS), "sizes": {"/etc/x": 1}}),
    "no name of a file": json.dumps({**dict.fromkeys(prepare.KEYS), "sizes": {"a\0b": 1}}),
    "half a letter": json.dumps({**dict.fromkeys(prepare.KEYS), "sizes": {"\ud800": 1}}),
    "too deep": "[" * 100_000,
    "sizes that are none": json.dumps({**dict.fromkeys(prepare.KEYS), "sizes": [3]}),
}


@pytest.mark.parametrize("name", ["own.json", ".own.lock"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("elsewhere.json")])
def test_pipes_and_links_in_our_places_are_left_alone(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = OwnFolder(tmp_path / "own", "own.json", ("key",))
    folder.path.mkdir()
    (folder.path / "own.json").write_text('{"key": 1, "sizes": {}}')
    (folder.path / name).unlink(missing_ok=True)
    (folder.path / "elsewhere.json").write_text('{"key": 1, "sizes": {}}')
    make(folder.path / name)
    before = contents(folder.path)
    refused = pytest.raises(UltraMemError, match="nothing of others is replaced")
    with refused, folder.locked(lambda: None):
        pass
    assert contents(folder.path) == before


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_folder_with_a_manifest_of_others_is_left_alone(
    text: Path, tmp_path: Path, manifest: str
) -> None:
    mine = tmp_path / "mine"
    (mine / "photos").mkdir(parents=True)
    (mine / "photos" / "a.jpg").write_text("years ago")
    (mine / "data.json").write_text(manifest)
    before = contents(tmp_path)
    with pytest.raises(UltraMemError, match=r"mine: was not made by this command"):
        prepare.prepare(text, mine, VOCAB_SIZE)
    assert contents(tmp_path) == before


def test_what_a_user_keeps_in_a_prepared_folder_stays(text: Path, prepared: Path) -> None:
    (prepared / "checkpoints").mkdir()
    (prepared / "checkpoints" / "model.pt").write_text("weeks of work")
    (prepared / "tokenizer" / "notes.md").write_text("mine")
    (prepared / ".unfinished-mine").mkdir()
    (prepared / ".unfinished-mine" / "draft").write_text("mine")
    first = json.loads((prepared / "data.json").read_text())["key"]
    assert prepare.prepare(text, prepared, VOCAB_SIZE + 1).key != first
    assert (prepared / "checkpoints" / "model.pt").read_text() == "weeks of work"
    assert (prepared / "tokenizer" / "notes.md").exists()
    assert (prepared / ".unfinished-mine" / "draft").exists()
    assert not list(prepared.glob(".unfinished-[!m]*"))


def test_neighbours_by_any_name_stay(text: Path, prepared: Path, tmp_path: Path) -> None:
    names = (".data.partial", ".data.old", ".data.lock")
    for name in names[:2]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / names[2]).write_text("mine")
    prepare.prepare(text, prepared, VOCAB_SIZE + 1)
    assert all((tmp_path / name / "mine").exists() for name in names[:2])
    assert (tmp_path / names[2]).read_text() == "mine"


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    texts = tmp_path / "corpus" / "texts"
    texts.mkdir(parents=True)
    (texts / "a.txt").write_text(TEXT)
    with pytest.raises(UltraMemError, match="was not made by this command"):
        prepare.prepare(texts, tmp_path / "corpus", VOCAB_SIZE)
    assert (texts / "a.txt").read_text() == TEXT
    # Inside the text it is passed over: the second call reads what the first one did.
    inside = texts / "prepared"
    first = prepare.prepare(texts, inside, VOCAB_SIZE)
    assert prepare.prepare(texts, inside, VOCAB_SIZE) == first
    (inside / "own.txt").write_text(TEXT)
    with pytest.raises(UltraMemError, match=r"prepared: is the folder of the text"):
        prepare.prepare(inside, inside, VOCAB_SIZE)


def test_a_link_to_a_larger_disk_is_filled_and_stays(text: Path, tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk)
    for vocab_size in (VOCAB_SIZE, VOCAB_SIZE + 1):
        prepare.prepare(text, link, vocab_size)
        assert link.is_symlink()
        assert (disk / "train.bin").exists()
    assert {item.name for item in tmp_path.iterdir()} == {"disk", "link", "text.txt"}


def link_file(prepared: Path, elsewhere: Path) -> None:
    (prepared / "train.bin").rename(elsewhere)
    (prepared / "train.bin").symlink_to(elsewhere)


def link_folder(prepared: Path, elsewhere: Path) -> None:
    (prepared / "tokenizer").rename(elsewhere)
    (prepared / "tokenizer").symlink_to(elsewhere)


def folder_for_file(prepared: Path, _: Path) -> None:
    (prepared / "train.bin").unlink()
    (prepared / "train.bin").mkdir()
    (prepared / "train.bin" / "mine").write_text("mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (link_file, "has a link in the place of train.bin"),
        (link_folder, "has a link in the place of tokenizer/"),
        (folder_for_file, "has something else in the place of train.bin"),
    ],
)
def test_links_in_the_place_of_our_files_are_refused(
    text: Path, prepared: Path, tmp_path: Path, change: Callable[[Path, Path], None], message: str
) -> None:
    change(prepared, tmp_path / "elsewhere")
    before = contents(tmp_path)
    with pytest.raises(UltraMemError, match=message):
        prepare.prepare(text, prepared, VOCAB_SIZE + 1)
    assert contents(tmp_path) == before


def test_a_file_that_is_not_listed_is_not_overwritten(tmp_path: Path) -> None:
    folder = OwnFolder(tmp_path / "own", "own.json", ["what"])
    with folder.locked(lambda: None):
        with folder.building() as built:
            (built / "a").write_text("ours")
            folder.publish(built, {"what": 1})
        (folder.path / "b").write_text("theirs")
        with folder.building() as built:
            (built / "a").write_text("newer")
            (built / "b").write_text("ours")
            with pytest.raises(UltraMemError, match="has a file b that this command did not make"):
                folder.publish(built, {"what": 2})
    assert (folder.path / "a").read_text() == "ours"
    assert (folder.path / "b").read_text() == "theirs"
    assert folder.read() == {"what": 1, "sizes": {"a": 4}}


def test_files_that_are_no_longer_made_are_removed(tmp_path: Path) -> None:
    folder = OwnFolder(tmp_path / "own", "own.json", ["what"])
    for names in (["old/deep/a", "both"], ["both", "new"]):
        with folder.locked(lambda: None), folder.building() as built:
            for name in names:
                (built / name).parent.mkdir(parents=True, exist_ok=True)
                (built / name).write_text(name)
            folder.publish(built, {"what": names})
    assert {item.name for item in folder.path.iterdir()} == {"both", "new", "own.json", ".own.lock"}


class Killed(BaseException):
    """As a process that ends between two system calls: nothing after it runs."""


@pytest.mark.parametrize("step", range(12))
def test_killed_at_any_step_it_is_ours_and_never_half_used(
    text: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Steps: two manifests, six files, a manifest, the folder's removal, the last manifest."""
    before = prepare.load(prepared)
    steps = iter(range(100))

    def until_killed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if next(steps) >= step:
                raise Killed
            return original(*args)

        return call

    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", until_killed(Path.replace))
        killed.setattr(shutil, "rmtree", until_killed(shutil.rmtree))
        with pytest.raises(Killed) if step < 11 else contextlib.nullcontext():
            prepare.prepare(text, prepared, VOCAB_SIZE + 1)
    found = prepare.load(prepared)
    assert found == before if step < 2 else found is None or step > 8
    assert prepare.prepare(text, prepared, VOCAB_SIZE + 1).vocab_size == VOCAB_SIZE + 1
    assert prepare.load(prepared) is not None
    assert not list(prepared.glob(".unfinished-*"))


def test_whole_files_are_written_without_a_name_that_others_may_have(tmp_path: Path) -> None:
    (tmp_path / ".a.json.partial").write_text("mine")
    write_whole(tmp_path / "a.json", "{}")
    assert contents(tmp_path) == {".a.json.partial": b"mine".hex(), "a.json": b"{}".hex()}


def test_removing_leaves_folders_that_hold_more(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "ours").touch()
    (tmp_path / "a" / "theirs").touch()
    remove(tmp_path, ["a/b/ours", "gone"])
    assert contents(tmp_path) == {"a/theirs": ""}
    assert not (tmp_path / "a" / "b").exists()
