"""NaN and infinity in what an optimizer loads are refused, with the parameter's name."""

import functools
import math

import pytest

from tests.training_runs import run_pretrain, tiny_gpt

_LONG = pytest.mark.long
_DISTRIBUTED = {"use_distributed_optimizer": True}
_KINDS = {
    "adam": {},
    "rows": {"ultramem_row_adam": True, "bf16": True},
    "fp16": {"fp16": True, "initial_loss_scale": 4096},
    "distributed": {**_DISTRIBUTED, "bf16": True},
    "distributed float32": _DISTRIBUTED,
    "reshardable": {**_DISTRIBUTED, "dist_ckpt_optim_fully_reshardable": True},
    "muon": {"optimizer": "muon", "bf16": True},
}
_QUICK = ("rows",)


def _groups(optimizer):
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in single.optimizer.param_groups:
            yield single.optimizer, group


def _places(optimizer):
    """(what, tensor or (dict, key)) of one of each kind that a checkpoint holds."""
    for torch_optimizer, group in _groups(optimizer):
        for parameter in group["params"][:1]:
            yield "float32 weights of ", parameter.data
            for name, value in torch_optimizer.state[parameter].items():
                if hasattr(value, "is_floating_point") and name != "step":
                    yield f"{name} of ", value
    scaler = getattr(getattr(optimizer, "chained_optimizers", [optimizer])[0], "grad_scaler", None)
    if scaler is not None:
        yield "loss scale", scaler._scale


def _try_each(folder, trained):
    """Save with each number poisoned, load again; what is said of each."""
    from megatron.training import get_args
    from megatron.training.checkpointing import load_checkpoint, save_checkpoint

    from ultramem_megatron.errors import NonFiniteError

    args = get_args()
    args.save = args.load = folder
    said = []
    for step, (what, tensor) in enumerate(_places(trained.optimizer), 100):
        flat = tensor.view(-1)
        before = flat[0].item()
        flat[0] = math.inf if step % 2 else math.nan
        save_checkpoint(step, trained.model, trained.optimizer, None, 0)
        args.ckpt_step = step
        try:
            load_checkpoint(trained.model, trained.optimizer, None)
            said.append((what, "nothing"))
        except NonFiniteError as error:
            said.append((what, str(error)))
        flat[0] = before
    return said


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in _QUICK else _LONG) for k in _KINDS]
)
def test_a_number_that_is_not_finite_is_refused(kind, tmp_path):
    flags = tiny_gpt(
        ultramem_spans="1:2",
        ultramem_num_keys=12,
        ultramem_topk=6,
        ckpt_format="torch_dist",
        train_iters=1,
        **_KINDS[kind],
    )
    run = run_pretrain(1, flags, on_finish=functools.partial(_try_each, str(tmp_path)))
    said = run.ranks[0].finished
    assert len(said) >= 3
    for what, message in said:
        if f"The loaded {what}" not in message:  # float32 parameters are the model's own
            assert what.startswith("float32")
            assert " of the model holds " in message or " of memory layer 1 holds " in message
        assert "holds NaN or infinity in 1 of" in message
    assert "--no-load-optim" in said[1][1]
