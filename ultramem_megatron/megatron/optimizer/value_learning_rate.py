"""Learning rate of the value tables: k times the base rate, falling linearly to 1x (paper 3.2).

The factor multiplies whatever Megatron's schedule gives (warm-up, decay, minimum), as in the
authors' code; weight decay applies to the tables as to all matrices, times `value_wd_mult`. Or the
rate is fixed, whatever the schedule, as Memory+ has it (arXiv 2412.09764).
"""

from typing import Any

from megatron.core.optimizer import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ultramem_megatron.megatron.checkpoint.finite_state import refuse_non_finite_settings
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.tables.value_table import VALUES_TAG


def value_overrides(config: UltraMemConfig) -> dict[ParamKey, dict[str, Any]]:
    """Optimizer overrides that put the value tables into a parameter group with lr_mult = k.

    A fixed rate is none of the schedule's: lr_mult = 0.
    """
    times = 0.0 if config.value_lr_fixed else config.value_lr_mult
    own = {"lr_mult": times, "wd_mult": config.value_wd_mult}
    own = {name: multiple for name, multiple in own.items() if multiple != 1.0}
    return {ParamKey(attr=VALUES_TAG): own} if own else {}


def value_lr_factor(start: float, progress: float, decay: float) -> float:
    """1 + (k-1) * max(0, 1 - progress/decay); progress and decay are fractions of training.

    With start 10 and decay 0.5: 10 at the beginning, 5.5 at a quarter, 1 from half-way on.
    """
    return 1 + (start - 1) * max(0.0, 1 - progress / decay)


_LARGE_STEP = 0.1
_SHORT_WARMUP = 100  # optimizer steps


def throw_warning(config: UltraMemConfig, max_lr: float, warmup_steps: float) -> str | None:
    """A line for a rate that would throw the tables about in the first steps; or None.

    Where all values move one way, as at first, a step of Adam moves a memory's output by
    rate * k * m*H / E (scores have mean square 1, the projection divides by E).
    """
    rate = config.value_lr_fixed or max_lr * config.value_lr_mult
    step = rate * config.picks / config.value_expansion
    if step > _LARGE_STEP and config.value_lr_fixed:
        return (
            f"WARNING: at --ultramem-value-lr-fixed {rate:g} one step can move a memory's output "
            f"by {step:.2g}, the first ones too. Lower it."
        )
    if step <= _LARGE_STEP or warmup_steps >= _SHORT_WARMUP:
        return None
    return (
        f"WARNING: at --lr {max_lr:g} and --ultramem-value-lr-mult {config.value_lr_mult:g} one "
        f"step can move a memory's output by {step:.2g}, after a warm-up of {warmup_steps:.0f} "
        f"steps. Warm up for {_SHORT_WARMUP} steps or more (--lr-warmup-iters), or lower one of "
        f"the two."
    )


class ValueLearningRateScheduler(OptimizerParamScheduler):
    """Megatron's scheduler with a factor for parameter groups whose `lr_mult` is not 1."""

    def __init__(
        self, *args: Any, value_lr_decay: float, value_lr_fixed: float = 0.0, **kwargs: Any
    ) -> None:
        """value_lr_decay: fraction of training over which the factor falls to 1.

        value_lr_fixed: rate of the groups whose `lr_mult` is 0.
        """
        self.value_lr_decay, self.value_lr_fixed = value_lr_decay, value_lr_fixed
        super().__init__(*args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Megatron's; raises NonFiniteError for a number that is NaN or infinite."""
        refuse_non_finite_settings([state_dict], "the learning-rate schedule")
        super().load_state_dict(state_dict)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Learning rate of a group at the present step."""
        base: float = super().get_lr(param_group)
        start = param_group.get("lr_mult", 1.0)
        if start == 1.0:
            return base
        if start == 0.0:
            return self.value_lr_fixed
        # Weight decay is scheduled over all of training, the learning rate maybe over less.
        progress = self.num_steps / self.wd_incr_steps
        return base * value_lr_factor(start, progress, self.value_lr_decay)

    def value_learning_rate(self) -> float | None:
        """The tables' present learning rate; None if this rank has no such group."""
        for group in self.optimizer.param_groups:
            if group.get("lr_mult", 1.0) != 1.0:
                return float(group["lr"])
        return None
