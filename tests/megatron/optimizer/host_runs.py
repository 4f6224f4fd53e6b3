"""Runs with tables in host memory beside runs with tables on the device."""

import torch

from tests.closeness import assert_close, rounding
from tests.megatron.optimizer.few_reads import few_reads
from tests.training_runs import run_pretrain

ROUNDING = rounding(torch.float32, 128)
HALF = 1e-2
"""bfloat16 gradients of one step, added up in another order."""
SKIPPING = {"fp16": True, "initial_loss_scale": 2**21, "hysteresis": 1, "train_iters": 6}
"""The first steps find gradients that are not finite."""


def flags(**changes):
    """Few reads of a table, four steps."""
    return few_reads(**{"train_iters": 4, "adam_eps": 1e-5, **changes})


def tables(run):
    """Every table with its float32 weights and moments, by name, wherever they are."""
    from ultramem_megatron.kernels.reading import UPKEEP, about_to_read_all
    from ultramem_megatron.megatron.optimizer.host_adam import HostAdam
    from ultramem_megatron.memory.tables.value_table import value_tables

    singles = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    found = {}
    for chunk in run.model:
        for name, table in value_tables(chunk).items():
            about_to_read_all(table.weight)
            keeper = getattr(table.weight, UPKEEP, None)
            if hasattr(keeper, "expand"):
                keeper.expand()
            if isinstance(keeper, HostAdam):
                main, state = keeper.master, keeper.state
            else:
                main = getattr(table.weight, "main_param", table.weight)
                state = next(s.optimizer.state[main] for s in singles if main in s.optimizer.state)
            held = (main, state["exp_avg"], state["exp_avg_sq"])
            found[name] = [tensor.detach() for tensor in held]
    return found


def trained(world_size, given, **options):
    """A run of these flags, with what it leaves."""
    return run_pretrain(world_size, given, parameters=True, on_finish=tables, **options)


def assert_same(ours, device, tolerance):
    """tolerance: relative, of squares twice as much; 0: to the bit."""
    for kind in ("losses", "grad_norms"):
        for mine, theirs in zip(getattr(ours, kind), getattr(device, kind), strict=True):
            assert abs(mine - theirs) <= tolerance * abs(theirs) or repr(mine) == repr(theirs)
    for mine, theirs in zip(ours.ranks, device.ranks, strict=True):
        for name, parameter in theirs.parameters.items():
            assert_close(mine.parameters[name], parameter, tolerance, name)
        assert mine.finished.keys() == theirs.finished.keys()
        for name, tensors in theirs.finished.items():
            for found, wanted in zip(mine.finished[name], tensors, strict=True):
                assert_close(found, wanted, 2 * tolerance, name)


def assert_trained_alike(ours, device, changes):
    """Runs of flags with these `changes`, to what their precision allows."""
    if "fp16" in changes:
        assert ours.iterations[0]["skipped"]
        assert not ours.iterations[-1]["skipped"]
    half = "bf16" in changes or "fp16" in changes
    assert_same(ours, device, HALF if half else ROUNDING)
