"""Applying, reverting and refusing patches."""

import sys
import types
from typing import Any

import pytest

from tests.ranks import run_on_ranks
from ultramem_megatron.patches import registry
from ultramem_megatron.patches.patch import PATCH_MARK, Editor, Patch, PatchError


def _double(x: int) -> int:
    return 2 * x


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for a Megatron module, importable as `upstream_stand_in`."""
    module: Any = types.ModuleType("upstream_stand_in")

    class Base:
        def method(self, x: int) -> int:
            return x

    class Derived(Base):
        pass

    module.double, module.Base, module.Derived = _double, Base, Derived
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def _patch(name: str = "stand_in", **changes: Any) -> Patch:
    settings: dict[str, Any] = {
        "symbols": ("upstream_stand_in.double",),
        "reason": "a test",
        "delete_when": "never",
        "install": lambda editor: editor.replace("upstream_stand_in.double", abs),
    }
    return Patch(name=name, **{**settings, **changes})


def test_replace_marks_and_revert_restores_the_same_object(upstream: Any) -> None:
    editor = Editor("stand_in")

    def triple(x: int) -> int:
        return 3 * x

    editor.replace("upstream_stand_in.double", triple, ("x",))
    assert upstream.double(2) == 6
    assert getattr(upstream.double, PATCH_MARK) == "stand_in"
    editor.revert()
    assert upstream.double is _double


def test_revert_removes_what_was_inherited(upstream: Any) -> None:
    editor = Editor("stand_in")
    editor.wrap("upstream_stand_in.Derived.method", lambda original: lambda self, x: -x)
    assert upstream.Derived().method(1) == -1
    assert upstream.Base().method(1) == 1
    editor.revert()
    assert "method" not in vars(upstream.Derived)
    assert upstream.Derived().method(1) == 1


def test_wrap_twice_reverts_to_the_first(upstream: Any) -> None:
    first, second = Editor("first"), Editor("second")
    first.wrap("upstream_stand_in.double", lambda original: lambda x: original(x) + 1, ("x",))
    after_first = upstream.double
    second.wrap("upstream_stand_in.double", lambda original: lambda x: original(x) + 10, ("x",))
    assert upstream.double(1) == 13
    second.revert()
    assert upstream.double is after_first


def test_another_signature_is_refused_with_both_lists(upstream: Any) -> None:
    with pytest.raises(PatchError, match=r"takes \('x',\).*written for \('x', 'y'\)"):
        Editor("stand_in").replace("upstream_stand_in.double", abs, ("x", "y"))
    assert upstream.double is _double


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("upstream_stand_in.missing", "does not exist"),
        ("upstream_stand_in.Missing.method", "has no 'Missing'"),
        ("no_such_module_at_all.function", "importable module"),
    ],
)
def test_a_missing_symbol_is_named(upstream: Any, path: str, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        Editor("stand_in").replace(path, abs)


def test_a_patch_that_fails_half_way_leaves_nothing_behind(
    upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(editor: Editor) -> None:
        editor.replace("upstream_stand_in.double", abs)
        editor.replace("upstream_stand_in.missing", abs)

    monkeypatch.setattr(registry, "all_patches", lambda: (_patch(install=install),))
    with pytest.raises(PatchError, match="missing"):
        registry.apply_all()
    assert upstream.double is _double
    assert not registry.is_applied("stand_in")


def test_apply_all_is_idempotent_and_skips_inactive(
    upstream: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    patches = (
        _patch("needed", install=lambda editor: calls.append("needed")),
        _patch("idle", install=lambda editor: calls.append("idle"), active=lambda: False),
    )
    monkeypatch.setattr(registry, "all_patches", lambda: patches)
    monkeypatch.delenv("RANK", raising=False)
    try:
        assert registry.apply_all() == ("needed",)
        assert registry.apply_all() == ("needed",)
    finally:
        registry.revert_all()
    assert calls == ["needed"]
    assert capsys.readouterr().out == "ultramem_megatron: patches applied: needed\n"


def test_only_rank_0_says_what_was_applied(
    upstream: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "all_patches", lambda: (_patch(),))
    monkeypatch.setenv("RANK", "1")
    try:
        registry.apply_all()
    finally:
        registry.revert_all()
    assert capsys.readouterr().out == ""


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "all_patches", lambda: (_patch(),))
    with pytest.raises(PatchError, match=r"unknown patches \['stand_on'\]; known: \['stand_in'\]"):
        registry.apply_all(["stand_on"])


@pytest.mark.parametrize("found", ["0.16.9", "0.20.0", "0.20.0rc1", "1.0"])
def test_an_unknown_megatron_is_refused_by_number(
    found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(registry.OVERRIDE, raising=False)
    monkeypatch.setattr(registry, "installed_version", lambda name: found)
    with pytest.raises(PatchError) as refusal:
        registry.apply_all()
    for part in (found, ">=0.17,<0.20", "ULTRAMEM_ALLOW_UNTESTED_MEGATRON=1"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("found", ["0.17.0", "0.18.2", "0.19.2", "0.19.10", "0.19.3.dev1"])
def test_versions_are_compared_as_numbers(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "installed_version", lambda name: found)
    assert str(registry.check_version()) == found


def test_a_patch_of_newer_versions_is_left_out(
    upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = (_patch("old"), _patch("new", versions=">=0.19"))
    monkeypatch.setattr(registry, "installed_version", lambda name: "0.18.2")
    monkeypatch.setattr(registry, "all_patches", lambda: patches)
    try:
        assert registry.apply_all() == ("old",)
    finally:
        registry.revert_all()


def test_the_override_lets_an_unknown_megatron_pass_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "installed_version", lambda name: "0.21.0")
    monkeypatch.setenv(registry.OVERRIDE, "1")
    registry.check_version()
    assert "0.21.0" in caplog.text


def test_the_override_leaves_out_only_what_is_bounded(
    upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = (_patch("any"), _patch("of_0_19", versions=">=0.19,<0.20"))
    monkeypatch.setattr(registry, "installed_version", lambda name: "0.20.0")
    monkeypatch.setattr(registry, "all_patches", lambda: patches)
    monkeypatch.setenv(registry.OVERRIDE, "1")
    try:
        assert registry.apply_all() == ("any",)
    finally:
        registry.revert_all()


def _owners() -> dict[str, Any]:
    """Every module and class that some patch touches."""
    import torch

    from ultramem_megatron.patches.patch import resolve

    owners: dict[str, Any] = {"torch": torch, "torch.Tensor": torch.Tensor}
    for patch in registry.all_patches():
        for symbol in patch.symbols:
            if symbol.startswith(("megatron.", "torch.cuda.")):
                owners[symbol.rpartition(".")[0]] = resolve(symbol)[0]
    return owners


def _apply_and_revert() -> tuple[list[str], list[str]]:
    owners = _owners()
    before = {name: dict(vars(owner)) for name, owner in owners.items()}
    registry.apply_all()
    changed = _differences(owners, before)
    registry.revert_all()
    return changed, _differences(owners, before)


def _differences(owners: dict[str, Any], before: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{name}.{attribute}"
        for name, owner in owners.items()
        for attribute in {*vars(owner), *before[name]} - {"__warningregistry__"}
        if vars(owner).get(attribute, KeyError) is not before[name].get(attribute, KeyError)
    ]


def test_everything_real_is_undone_exactly() -> None:
    [(changed, left)] = run_on_ranks(1, _apply_and_revert)
    assert "megatron.core.datasets.utils.compile_helpers" in changed
    assert "torch.zeros" in changed
    assert left == []


def _print_table() -> str:
    import contextlib
    import io

    from ultramem_megatron.patches.__main__ import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        main([])
    return text.getvalue()


def test_the_table_names_every_patch_with_its_reason() -> None:
    [table] = run_on_ranks(1, _print_table)
    for name in registry.PATCH_MODULES:
        assert f"\n{name}\n" in table
    words = " ".join(table.split())
    assert "runs `make` in site-packages" in words
    assert words.count("active here") == len(registry.PATCH_MODULES)
