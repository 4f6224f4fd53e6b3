"""The quickstart's recipe: where it stops and resumes, and how a user's flags enter it."""

from pathlib import Path

import pytest

from launch import recipe
from ultramem_megatron.errors import UltraMemError


@pytest.mark.parametrize("steps", [3, 4, 5, 7, 8, 9, 15, 16, 100, 240, 1001])
def test_run_is_left_and_resumed_within_its_steps(steps: int) -> None:
    made = recipe.make_recipe(tiny=True, steps=steps)
    assert 1 < made.resume_at < steps
    assert made.resume_at % made.eval_interval == 0
    assert 0.5 <= made.resume_at / steps <= 0.88


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(UltraMemError, match=r"--steps 2: must be at least 3"):
        recipe.make_recipe(tiny=True, steps=2)


def test_users_flags_replace_ours_or_are_appended() -> None:
    extra = ("--lr", "5e-4", "--bf16", "--global-batch-size=32", "--ultramem-spans", "2:2")
    made = recipe.make_recipe(tiny=False, steps=None, extra=extra)
    assert made.training["lr"] == 5e-4
    assert made.memory["ultramem-spans"] == "2:2"
    assert made.extra == ("--bf16",)
    assert made.tokens_per_step == 32 * 256
    arguments = made.arguments(Path("data"), Path("run"))
    assert arguments.count("--lr") == 1
    assert arguments[arguments.index("--lr") + 1] == "0.0005"
    assert arguments[-1] == "--bf16"


def test_users_flags_go_before_the_tiny_sizes() -> None:
    made = recipe.make_recipe(tiny=True, steps=None, extra=("--hidden-size", "64"))
    assert (made.model["hidden-size"], made.model["num-layers"]) == (64, 2)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--global-batch-size", "many"), r"--global-batch-size many: must be a whole number"),
        (("--lr", "fast"), r"--lr fast: must be a number, for example"),
        (("--num-layers",), r"--num-layers : must be a whole number"),
    ],
)
def test_values_of_a_wrong_kind_are_refused(extra: tuple[str, ...], message: str) -> None:
    with pytest.raises(UltraMemError, match=message):
        recipe.make_recipe(tiny=False, steps=None, extra=extra)
