"""Train as `ultramem train` does, and keep what a comparison needs, rank by rank.

    ULTRAMEM_RECORD_TO=FOLDER torchrun ... -m ultramem_megatron.tools.verify_parallel.record <flags>

Each rank leaves FOLDER/rank<N>.pt: losses and gradient norms of all steps, gradients of the first
step, weights after the last, and where each tensor belongs in the whole model.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ultramem_megatron.errors import exit_on_user_error
from ultramem_megatron.kernels.reading import about_to_read_all
from ultramem_megatron.tools.verify_parallel.shards import whole_tensors
from ultramem_megatron.tools.verify_parallel.whole_model import pieces
from ultramem_megatron.training.pretrain import main

FOLDER = "ULTRAMEM_RECORD_TO"


class Recorder:
    """Listens to Megatron's training loop."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.model: list[Any] = []

    def listen(self) -> None:
        """Put itself between `pretrain()` and its training loop."""
        from megatron.training import training

        log, train = training.training_log, training.train

        def training_log(
            losses: Any, totals: Any, rate: Any, iteration: int, *rest: Any, **named: Any
        ) -> Any:
            scale, _, skipped, grad_norm = rest[:4]
            loss = losses.get("lm loss")
            self.steps.append(
                {
                    "iteration": iteration,
                    "skipped": float(skipped),
                    "loss scale": float(scale),
                    "loss": float("nan") if loss is None else float(loss),
                    "grad norm": float("nan") if grad_norm is None else float(grad_norm),
                }
            )
            return log(losses, totals, rate, iteration, *rest, **named)

        def listened(step: Any, model: Any, optimizer: Any, *rest: Any, **named: Any) -> Any:
            self.model = model
            self._keep_first_gradients(optimizer)
            return train(step, model, optimizer, *rest, **named)

        training.training_log, training.train = training_log, listened

    def _keep_first_gradients(self, optimizer: Any) -> None:
        step = optimizer.step

        def first_step(*args: Any, **kwargs: Any) -> Any:
            self.gradients = self._tensors(lambda p: getattr(p, "main_grad", p.grad))
            optimizer.step = step
            return step(*args, **kwargs)

        optimizer.step = first_step

    def _tensors(self, of: Any) -> dict[str, torch.Tensor]:
        return {name: whole.float() for name, whole in whole_tensors(self.model, of).items()}

    def save(self, folder: Path) -> None:
        """Write this rank's file."""
        for chunk in self.model:
            for parameter in chunk.parameters():
                about_to_read_all(parameter)
        where = {name: asdict(piece) for name, piece in pieces(self.model).items()}
        content = {
            "steps": self.steps,
            "gradients": self.gradients,
            "weights": self._tensors(lambda parameter: parameter),
            "pieces": where,
        }
        torch.save(content, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    recorder = Recorder()
    with exit_on_user_error():
        main(before_training=recorder.listen)
        recorder.save(Path(os.environ[FOLDER]))
