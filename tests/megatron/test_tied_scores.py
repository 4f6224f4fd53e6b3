"""Where all keys are one key every score is a tie, and the ranks of a group still pick alike."""

import pytest
import torch

from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.memory.retrieval.keys import ProductKeys

_picks: list[torch.Tensor] = []


def _tie() -> None:
    """In a rank: keys start equal; what they pick is noted."""
    reset = ProductKeys.reset

    def equal(self, *arguments):
        reset(self, *arguments)
        with torch.no_grad():
            self.weight.copy_(self.weight[:, :, :1].clone().expand_as(self.weight))

    setattr(ProductKeys, "reset", equal)  # noqa: B010  # in a process of its own
    torch.nn.modules.module.register_module_forward_hook(_note)


def _note(module, inputs, output):
    if isinstance(module, ProductKeys):
        scores = output[1]
        assert torch.allclose(scores, scores[..., :1], rtol=1e-4), "no ties"
        _picks.append(output[0].clone())


def _noted(trained):
    return _picks


@pytest.mark.parametrize("partition", ["number", "dimension"])
def test_ranks_that_share_tables_pick_the_same_of_equal_scores(partition):
    argv = tiny_gpt(
        ultramem_spans="1:2",
        ultramem_num_keys=12,
        ultramem_topk=6,
        ultramem_partition=partition,
        tensor_model_parallel_size=2,
        train_iters=1,
    )
    run = run_pretrain(2, argv, before=_tie, on_finish=_noted, parameters=True)
    first, second = (rank.finished for rank in run.ranks)
    assert len(first) == len(second) > 0
    assert all(map(torch.equal, first, second))
    replicated = [
        n for n in run.ranks[0].parameters if "memory" in n and not n.endswith("values.weight")
    ]
    assert any("keys" in name for name in replicated)
    for name in replicated:
        one, other = (rank.parameters[name] for rank in run.ranks)
        assert torch.equal(one, other), name
