"""What the quickstart trains: every flag, in three tables, for its full and its tiny size."""

from dataclasses import dataclass
from pathlib import Path

from launch.small_models import Flags, text_gpt
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.presets.flags import as_words

MODEL: Flags = text_gpt(layers=6, hidden=256, heads=4, length=256)

# Two memories of 128 x 128 values; with four virtual values each, 65,536 addresses per memory.
MEMORY: Flags = {
    "ultramem-spans": "2:3/5:6",
    "ultramem-num-keys": 128,
    "ultramem-key-dim": 64,
    "ultramem-value-dim": 128,
    "ultramem-topk": 16,
    "ultramem-heads": 2,
    "ultramem-tucker-rank": 2,
    "ultramem-cores": 2,
    "ultramem-value-expansion": 4,
}

TRAINING: Flags = {
    "micro-batch-size": 2,
    "global-batch-size": 4,
    "lr": 2e-3,
    "min-lr": 2e-4,
    "lr-decay-style": "cosine",
    "lr-warmup-fraction": 0.05,
    "adam-beta2": 0.95,
    "weight-decay": 0.1,
    "clip-grad": 1.0,
    "seed": 1234,
}

TINY: Flags = {
    "num-layers": 2,
    "hidden-size": 32,
    "num-attention-heads": 2,
    "seq-length": 32,
    "max-position-embeddings": 32,
    "ultramem-spans": "1:2",
    "ultramem-num-keys": 16,
    "ultramem-key-dim": 16,
    "ultramem-value-dim": 16,
    "ultramem-topk": 4,
}
"""Replaces entries of the tables above where only the plumbing is of interest."""

STEPS, TINY_STEPS = 400, 4
VOCAB_SIZE, TINY_VOCAB_SIZE = 4096, 512
EVALUATIONS = 8  # during training; each on EVAL_BATCHES global batches
EVAL_BATCHES = 8


@dataclass(frozen=True)
class Recipe:
    """A run that is checkpointed and left at `resume_at`, then resumed up to `steps`.

    Attributes:
        model, memory, training: Megatron's flags without their dashes, and their values.
        steps: optimizer steps in all.
        extra: the user's own flags, appended as they are.
    """

    model: Flags
    memory: Flags
    training: Flags
    steps: int
    vocab_size: int
    extra: tuple[str, ...]

    @property
    def eval_interval(self) -> int:
        """Steps between two evaluations."""
        return max(1, self.steps // EVALUATIONS)

    @property
    def resume_at(self) -> int:
        """The step whose checkpoint is resumed from: three quarters, with an evaluation."""
        intervals = max(1, round(0.75 * self.steps / self.eval_interval))
        return min(intervals * self.eval_interval, self.steps - 1)

    @property
    def tokens_per_step(self) -> int:
        """Tokens all ranks together train on in one step."""
        return int(self.training["global-batch-size"]) * int(self.model["seq-length"])

    @property
    def sample_tokens(self) -> int:
        """Tokens to sample: leaves half of the trained length to the prompt."""
        return min(120, int(self.model["seq-length"]) // 2)

    def arguments(self, data: Path, run: Path) -> list[str]:
        """The command line of `ultramem train`, all but where it stops and starts."""
        schedule: Flags = {
            "train-iters": self.steps,
            "eval-interval": self.eval_interval,
            "eval-iters": EVAL_BATCHES,
            "log-interval": 1,
            "save-interval": self.steps,
        }
        files: Flags = {
            "tokenizer-type": "HuggingFaceTokenizer",
            "tokenizer-model": str(data / "tokenizer"),
            "train-data-path": str(data / "train"),
            "valid-data-path": str(data / "valid"),
            "data-cache-path": str(run / "data_index"),
            "save": str(run / "checkpoints"),
            "tensorboard-dir": str(run / "tensorboard"),
        }
        tables = (self.model, self.memory, self.training, schedule, files)
        return [part for table in tables for part in as_words(table)] + list(self.extra)


def make_recipe(*, tiny: bool, steps: int | None, extra: tuple[str, ...] = ()) -> Recipe:
    """The quickstart's recipe at one of its sizes.

    Raises:
        UltraMemError: too few steps to train, save, resume and train on.
    """
    steps = steps if steps is not None else (TINY_STEPS if tiny else STEPS)
    if steps < 3:
        raise UltraMemError(
            f"--steps {steps}: must be at least 3, two before the checkpoint and one after it."
        )
    replaced, rest = _take_known(extra)
    replaced = {**(TINY if tiny else {}), **replaced}
    model, memory, training = (
        {name: replaced.get(name, value) for name, value in table.items()}
        for table in (MODEL, MEMORY, TRAINING)
    )
    vocab_size = TINY_VOCAB_SIZE if tiny else VOCAB_SIZE
    return Recipe(model, memory, training, steps, vocab_size, rest)


def _take_known(extra: tuple[str, ...]) -> tuple[Flags, tuple[str, ...]]:
    """Splits the user's flags into new values for our tables' entries, and the rest.

    Megatron would accept a flag twice; the summary must name the value that counts.
    """
    known = {n: v for table in (MODEL, MEMORY, TRAINING) for n, v in table.items() if v is not True}
    replaced: dict[str, str | int | float | bool] = {}
    rest: list[str] = []
    arguments = iter(extra)
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if name in known and argument.startswith("--"):
            replaced[name] = _like(known[name], value if equals else next(arguments, ""), name)
        else:
            rest.append(argument)
    return replaced, tuple(rest)


def _like(default: str | int | float | bool, text: str, name: str) -> str | int | float | bool:
    """`text` in the type of the value it replaces."""
    try:
        return type(default)(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise UltraMemError(f"--{name} {text}: must be {kind}, for example {default}.") from None
