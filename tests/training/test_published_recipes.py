"""Five published recipes, scaled down and otherwise as they stand, with memories and without.

tests/recipes/published/ has their flags: first as published, then what makes them small. No kernel
of a GPU is in them; everything else is. The last of a flag counts.
"""

import math
import os
import shlex
from pathlib import Path

import pytest

from tests import ROOT
from tests.ranks import run_on_ranks
from tests.training.test_run_script import checkout_scripts, run_script
from tests.training_runs import run_pretrain

_RECIPES = {path.stem: path for path in (ROOT / "tests/recipes/published").glob("*.txt")}
_EVERYWHERE = shlex.split(
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 510 --num-workers 0 "
    "--log-interval 1 --eval-iters 0"
)
_STEPS = shlex.split("--train-iters 3")
_MEMORIES = shlex.split(
    "--ultramem-preset ultramem-151m-x12 --ultramem-spans 1:2/3:4 --ultramem-num-keys 12 "
    "--ultramem-key-dim 16 --ultramem-value-dim 16 --ultramem-topk 6"
)
_RANKS = 4
_FIRST_LOSS = math.log(512)
"""Of ids that are all as likely."""


def _words(recipe: str, memories: bool = True) -> list[str]:
    words = shlex.split(_RECIPES[recipe].read_text(), comments=True)
    steps = [] if "--train-samples" in words else _STEPS
    interval = [] if "--eval-interval" in words else ["--eval-interval", "1000"]
    return [*words, *_EVERYWHERE, *steps, *interval, *(_MEMORIES if memories else [])]


def _check(losses: list[float]) -> None:
    assert len(losses) >= 3
    assert losses[0] == pytest.approx(_FIRST_LOSS, abs=0.03)  # weights are small, ids are many
    assert max(losses) < _FIRST_LOSS + 0.1


def test_all_five_are_there():
    assert sorted(_RECIPES) == ["deepseek-v3", "gpt3", "llama3", "mixtral", "qwen3"]


def test_a_recipe_with_latent_attention_prediction_experts_and_sequence_parallelism():
    _check(run_pretrain(_RANKS, _words("deepseek-v3")).losses)


@pytest.mark.long
def test_its_layout_changes_nothing():
    """Tensor and sequence parallelism beside experts over ranks; in float32, to compare."""
    words = [word for word in _words("deepseek-v3") if word != "--bf16"]
    layout = shlex.split("--pipeline-model-parallel-size 1 --adam-eps 1e-5")
    while "--pipeline-model-parallel-layout" in words:
        drop = words.index("--pipeline-model-parallel-layout")
        del words[drop : drop + 2]
    shared = run_pretrain(_RANKS, [*words, *layout])
    alone = [word for word in [*words, *layout] if word != "--sequence-parallel"]
    plain = run_pretrain(2, [*alone, "--tensor-model-parallel-size", "1"])
    assert shared.losses == pytest.approx(plain.losses, abs=2e-5)
    assert shared.grad_norms == pytest.approx(plain.grad_norms, rel=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("memories", [True, False])
@pytest.mark.parametrize("recipe", sorted(_RECIPES))
def test_it_trains(recipe, memories):
    _check(run_pretrain(_RANKS, _words(recipe, memories)).losses)


@pytest.mark.long
@pytest.mark.skipif(
    "MEGATRON_LM_PATH" not in os.environ,
    reason="MEGATRON_LM_PATH names no checkout of Megatron-LM 0.19",
)
@pytest.mark.parametrize("recipe", sorted(_RECIPES))
def test_upstreams_script_trains_it_with_memories(recipe, tmp_path: Path):
    script = checkout_scripts(tmp_path)
    losses = run_on_ranks(_RANKS, run_script, [str(script), *_words(recipe)])
    _check(losses[-1])
