"""Forward step and loss of a GPT task, as Megatron's `pretrain()` takes them.

Megatron-LM keeps these in its script pretrain_gpt.py, which the megatron-core wheel does not hold.
Shapes: B micro-batch size, S sequence length on this context-parallel rank.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model, get_model_config
from megatron.training import get_args, get_timers
from torch import Tensor

from ultramem_megatron.training.gpt_batches import get_batch, packed_sequence

LossAndReport = tuple[Tensor, Tensor, dict[str, Tensor]]

_SPIKE_FACTOR = 10
"""--check-for-spiky-loss reports a loss this many times the largest one seen."""


_straggler = StragglerDetector()


def loss_func(loss_mask: Tensor, token_losses: Tensor) -> LossAndReport:
    """Sum the losses of the tokens that count.

    Megatron divides afterwards: by the tokens of this micro-batch, or, under
    --calculate-per-token-loss, by those of the whole step.

    Args:
        loss_mask: float32 [B, S], 1 where the token counts.
        token_losses: [B, S], the model's output.

    Returns:
        Sum of losses (float32 scalar), number of tokens (int scalar), and what to report:
        "lm loss" as [sum, number of tokens].
    """
    mask = loss_mask.view(-1).float()
    loss = (token_losses.view(-1).float() * mask).sum()
    num_tokens = mask.sum().detach().to(torch.int)
    _validate_loss(loss)
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": report}


def _validate_loss(loss: Tensor) -> None:
    """Hand NaN, infinite and sudden losses to Megatron's rerun state machine, where asked for."""
    args = get_args()
    machine = get_rerun_state_machine()
    checks: list[tuple[Callable[[Tensor], Any], str, bool]] = []
    if args.check_for_nan_in_loss_and_grad:
        checks.append((torch.isnan, "the loss of this rank is NaN", True))
        checks.append((torch.isinf, "the loss of this rank is infinite", True))
    if args.check_for_spiky_loss:
        spiky = functools.partial(
            machine.is_unexpectedly_large, threshold=_SPIKE_FACTOR, context="loss"
        )
        checks.append((spiky, f"the loss exceeds {_SPIKE_FACTOR} times the largest so far", False))
    for rejects, message, fatal in checks:
        # A repeated forward pass gives the same bits, hence no tolerance.
        machine.validate_result(
            result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=fatal
        )


def forward_step(
    data_iterator: Iterator[dict[str, Any]] | None, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Callable[..., LossAndReport]]:
    """One micro-batch through the chunk of the model that this pipeline stage holds.

    Args:
        data_iterator: iterator of Megatron's data loader.
        model: GPTModel in its wrappers.
        return_schedule_plan: set by --overlap-moe-expert-parallel-comm; then the model's plan is
            returned in place of its output.

    Returns:
        Output of the stage, and the loss function for it.
    """
    args = get_args()
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _straggler(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        config = get_model_config(model)
        batch = get_batch(data_iterator, config, vp_stage, evaluates=not model.training)
    documents = packed_sequence(batch, args.seq_length)
    timers("batch-generator").stop()

    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    targets = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    with _straggler:
        if return_schedule_plan:
            output = model.build_schedule_plan(*inputs, **targets)
        else:
            output = model(*inputs, **targets, packed_seq_params=documents)
    # The schedule calls the loss function on the last stage only, and there the mask exists.
    return output, functools.partial(loss_func, cast(Tensor, batch["loss_mask"]))
