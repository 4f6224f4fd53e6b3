"""Whole training runs in tests: `run_pretrain` calls our `main()` on fresh ranks and records it.

run = run_pretrain(2, tiny_gpt(tensor_model_parallel_size=2, train_iters=3), gradients_at=1)
run.losses            # full precision, one per iteration
run.ranks[0].gradients["module.decoder.final_layernorm.weight"]
"""

import functools
import inspect
import multiprocessing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.ranks import run_on_ranks
from ultramem_megatron.tools.verify_parallel.shards import whole_tensors

_TINY_GPT: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "position_embedding_type": "rope",
    "hidden_dropout": 0,
    "attention_dropout": 0,
    "untie_embeddings_and_output_weights": True,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": 3,
    "lr": 1e-3,
    "min_lr": 1e-4,
    "mock_data": True,
    "tokenizer_type": "NullTokenizer",
    # A multiple of 128 x TP for every TP up to 4: padding of the vocabulary is the same for all.
    "vocab_size": 512,
    "num_workers": 0,
    "log_interval": 1,
    "eval_iters": 0,
    "eval_interval": 1000,
}

IN_BACKGROUND: dict[str, str | int | float | bool] = {
    "async_save": True,
    "use_persistent_ckpt_worker": True,
    "async_strategy": "mcore",
}
"""Megatron's flags for saves that training does not wait for; it needs all three."""


def tiny_gpt(**changes: Any) -> list[str]:
    """Megatron's flags for a GPT that trains in milliseconds, with changes by name.

    `lr=3e-4` gives --lr 0.0003, `bf16=True` gives --bf16, `mock_data=False` (or None) leaves a
    flag out, a list gives several values.
    """
    words: list[str] = []
    for name, value in {**_TINY_GPT, **changes}.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.extend(str(v) for v in (value if isinstance(value, (list, tuple)) else [value]))
    return words


@dataclass
class Trained:
    """What `on_finish` may look at, inside the rank."""

    model: list[Any]
    """Model chunks in their wrappers (DistributedDataParallel)."""
    optimizer: Any
    args: Any


@dataclass
class RankRun:
    """What one rank recorded."""

    iterations: list[dict[str, float]] = field(default_factory=list)
    """One entry per iteration: iteration, learning_rate, grad_norm, loss_scale, skipped, and on
    the last pipeline stage every entry of Megatron's loss dictionary ("lm loss", ...)."""
    gradients: dict[str, Any] = field(default_factory=dict)
    """Name -> main_grad (float32) as the optimizer found it: reduced, not yet clipped. Under the
    distributed optimizer only this rank's part of each buffer is reduced."""
    initial_parameters: dict[str, Any] = field(default_factory=dict)
    """Name -> value before the first iteration (after loading a checkpoint, if there was one)."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Name -> value after the last iteration; a second model chunk's names start with "1."."""
    finished: Any = None
    """What `on_finish` returned."""


@dataclass
class TrainingRun:
    """A run over all its ranks."""

    ranks: list[RankRun]

    @property
    def iterations(self) -> list[dict[str, float]]:
        """Records of the last rank, which always is on the last pipeline stage."""
        return self.ranks[-1].iterations

    @property
    def losses(self) -> list[float]:
        """ "lm loss" of every iteration."""
        return [record["lm loss"] for record in self.iterations]

    @property
    def grad_norms(self) -> list[float]:
        """Global gradient norm of every iteration, before clipping."""
        return [record["grad_norm"] for record in self.iterations]


def run_pretrain(
    world_size: int,
    argv: Sequence[str],
    *,
    gradients_at: int | None = None,
    initial_parameters: bool = False,
    parameters: bool = False,
    before: Callable[[], None] | None = None,
    on_finish: Callable[[Trained], Any] | None = None,
    patches: Collection[str] | None = None,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    print_output: bool = False,
) -> TrainingRun:
    """Train through `ultramem_megatron.training.pretrain.main(argv)` on `world_size` fresh ranks.

    Args:
        world_size: number of processes.
        argv: Megatron's flags, see `tiny_gpt`.
        gradients_at: iteration whose gradients to return (1 is the first), None for none.
        initial_parameters: whether to return the parameters as training found them.
        parameters: whether to return the final parameters.
        before: called in every rank before anything else; a function at the top of its module.
        on_finish: called in every rank after training; likewise.
        patches: names of the patches to apply, None for all that the machine needs.
        timeout, env, print_output: as for `run_on_ranks`.

    Raises:
        RanksFailed: with every rank's traceback and output.
    """
    rank_runs = run_on_ranks(
        world_size,
        _pretrain_rank,
        list(argv),
        gradients_at,
        initial_parameters,
        parameters,
        before,
        on_finish,
        patches,
        timeout=timeout,
        env=env,
        print_output=print_output,
    )
    return TrainingRun(rank_runs)


def _pretrain_rank(
    argv: list[str],
    gradients_at: int | None,
    initial_parameters: bool,
    parameters: bool,
    before: Callable[[], None] | None,
    on_finish: Callable[[Trained], Any] | None,
    patches: Collection[str] | None,
) -> RankRun:
    """Body of one rank of `run_pretrain`."""
    from ultramem_megatron.training.pretrain import main

    if before is not None:
        before()
    if "--save" in argv:
        make_saving_fast()
    run = RankRun()
    trained = _record(run, gradients_at, initial_parameters)
    try:
        main(argv, patches=patches)
    except SystemExit as stop:  # --exit-interval
        if stop.code:
            raise
    if parameters:
        run.parameters = whole_tensors(trained[0].model, _up_to_date)
    if on_finish is not None:
        run.finished = on_finish(trained[0])
    return run


def _up_to_date(parameter: Any) -> Any:
    """With --ultramem-row-adam rows that nobody reads are behind."""
    from ultramem_megatron.kernels.reading import about_to_read_all

    about_to_read_all(parameter)
    return parameter


def make_saving_fast() -> None:
    """Fork the process that Megatron's checkpoint writer would spawn, importing torch anew (3 s).

    Must come before anything starts threads.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()


def _record(run: RankRun, gradients_at: int | None, initial_parameters: bool) -> list[Trained]:
    """Listen to Megatron's training loop; returns a list that will hold what it trained."""
    from megatron.training import training

    trained: list[Trained] = []
    log, train = training.training_log, training.train

    @functools.wraps(log)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        run.iterations.append(_numbers(*args, **kwargs))
        return log(*args, **kwargs)

    @functools.wraps(train)
    def recorded_train(step: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        trained.append(Trained(model, optimizer, training.get_args()))
        if initial_parameters:
            run.initial_parameters = whole_tensors(model, lambda parameter: parameter)
        _snapshot_gradients(run, trained[0], gradients_at)
        return train(step, model, optimizer, *args, **kwargs)

    training.training_log, training.train = training_log, recorded_train
    return trained


def _numbers(*args: Any, **kwargs: Any) -> dict[str, float]:
    """One record from the arguments of Megatron's `training_log`."""
    from megatron.training import training

    given = inspect.signature(training.training_log).bind(*args, **kwargs).arguments
    record = {
        "iteration": given["iteration"],
        "learning_rate": given["learning_rate"],
        "grad_norm": given["grad_norm"],
        "loss_scale": given["loss_scale"],
        "skipped": given["skipped_iter"],
        **given["loss_dict"],
    }
    return {name: float("nan") if value is None else float(value) for name, value in record.items()}


def _snapshot_gradients(run: RankRun, trained: Trained, at: int | None) -> None:
    """Copy the gradients of iteration `at` when the optimizer is about to use them."""
    step = trained.optimizer.step

    def recorded_step(*args: Any, **kwargs: Any) -> Any:
        if trained.args.curr_iteration + 1 == at:
            run.gradients = whole_tensors(trained.model, lambda p: getattr(p, "main_grad", p.grad))
        return step(*args, **kwargs)

    trained.optimizer.step = recorded_step
