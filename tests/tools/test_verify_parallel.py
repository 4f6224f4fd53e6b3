"""The comparison of two layouts: what it finds, what it refuses, and one run of it."""

import pytest
import torch

from tests.training_runs import tiny_gpt
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.verify_parallel.__main__ import main, parse
from ultramem_megatron.tools.verify_parallel.compare import compare
from ultramem_megatron.tools.verify_parallel.whole_model import Piece, assemble


def test_tables_and_shards_are_put_together():
    whole = torch.arange(12.0).view(4, 3)
    ranks = [
        (
            {
                "w": Piece("w", partition_dim=1, tp_rank=rank),
                "b": Piece("b"),
                "t": Piece("t", corner=(2 * rank, 0), whole=(4, 3)),
            },
            {
                "w": whole[:, rank : rank + 1],
                "b": whole[0] + 0.5 * rank,
                "t": whole[2 * rank : 2 * rank + 2],
            },
        )
        for rank in (1, 0)
    ]
    found = assemble(ranks)
    assert torch.equal(found["w"].tensor, whole[:, :2])
    assert torch.equal(found["t"].tensor, whole)
    assert found["b"].replica_error > 0.1
    assert found["t"].replica_error == 0


def test_shards_of_a_gated_mlp_hold_two_halves_each():
    gate, other = torch.arange(8.0).view(4, 2), torch.arange(8.0, 16.0).view(4, 2)
    ranks = []
    for rank in (0, 1):
        rows = slice(2 * rank, 2 * rank + 2)
        piece = Piece("w", partition_dim=0, tp_rank=rank, parts=(2, 2))
        ranks.append(({"w": piece}, {"w": torch.cat([gate[rows], other[rows]])}))
    assert torch.equal(assemble(ranks)["w"].tensor, torch.cat([gate, other]))


def _recorded(loss, weight):
    step = {"iteration": 1, "loss": loss, "grad norm": 1.0}
    tensors = {"w": torch.tensor([weight])}
    return [
        {"steps": [step], "gradients": tensors, "weights": tensors, "pieces": {"w": {"name": "w"}}}
    ]


def test_differences_are_found_where_they_are():
    found = {d.kind: d for d in compare(_recorded(2.0, 1.0), _recorded(2.1, 1.5))}
    assert found["loss"].value == pytest.approx(0.05)
    assert found["grad norm"].value == 0
    assert found["weights"].value == pytest.approx(0.5)
    assert found["weights"].place == "w"
    assert found["replicas of weights"].value == 0


def test_models_of_other_shapes_are_not_compared():
    other = _recorded(2.0, 1.0)
    other[0]["weights"] = other[0]["gradients"] = {"w": torch.zeros(2)}
    with pytest.raises(UltraMemError, match=r"w is \(1,\) in the first layout and \(2,\) in the"):
        compare(_recorded(2.0, 1.0), other)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ranks", "1", "2"], "found 0 '--'"),
        (["--ranks", "1", "2", "--", "a"], "found 1 '--'"),
        (["--ranks", "0", "2", "--", "--"], "--ranks has 0"),
        (["--ranks", "1", "2", "--steps", "0", "--", "--"], "--steps has 0"),
        (["--ranks", "1", "2", "--lr", "1", "--", "--load", "x", "--"], "--load: set by"),
        (["--ranks", "1", "2", "--", "--", "--use-megatron-fsdp"], "of its own format alone"),
    ],
)
def test_wrong_calls_are_refused(argv, message):
    with pytest.raises(UltraMemError, match=message):
        parse(argv)


_SPANS = {"ultramem_spans": "1:2", "ultramem_num_keys": 8, "ultramem_topk": 4}
_EXPERTS = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "allgather",
}

_MEGATRON_FSDP = {
    "use_megatron_fsdp": True,
    "data_parallel_sharding_strategy": "optim_grads_params",
    "ckpt_format": "fsdp_dtensor",
}


@pytest.mark.parametrize(
    ("model", "first", "second"),
    [
        ({}, (1, ""), (2, "--ultramem-partition number")),
        pytest.param(
            {},
            (2, "--ultramem-partition dimension"),
            (4, "--ultramem-partition grid --ultramem-node-size 2"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"swiglu": True}, (1, ""), (2, "--tensor-model-parallel-size 2"), marks=pytest.mark.long
        ),
        pytest.param(
            {"swiglu": True},
            (1, ""),
            (2, "--use-torch-fsdp2 --ultramem-partition number"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"swiglu": True, **_MEGATRON_FSDP},
            (1, ""),
            (2, "--ultramem-partition number"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"swiglu": True, **_EXPERTS},
            (2, "--expert-model-parallel-size 2"),
            (4, "--expert-model-parallel-size 4"),
            marks=pytest.mark.long,
        ),
    ],
    ids=["tables", "grid", "gated shards", "FSDP2", "Megatron-FSDP", "experts"],
)
def test_two_layouts_agree(model, first, second, capsys):
    common = tiny_gpt(
        num_layers=2,
        disable_bias_linear=True,
        train_iters=None,
        make_vocab_size_divisible_by=256,
        **model,
        **_SPANS,
    )
    ranks = ["--ranks", str(first[0]), str(second[0]), "--steps", "2"]
    assert main([*ranks, *common, "--", *first[1].split(), "--", *second[1].split()]) == 0
    assert "layouts agree" in capsys.readouterr().out


def test_a_refused_layout_is_reported_with_its_message():
    common = tiny_gpt(num_layers=2, train_iters=None, ultramem_spans="1:3", ultramem_num_keys=8)
    with pytest.raises(UltraMemError, match=r"on 1 ranks failed:\nerror: --ultramem-spans 1:3"):
        main(["--ranks", "1", "1", *common, "--", "--"])


def test_what_a_rank_raised_is_shown_and_not_what_its_launcher_says(tmp_path):
    file = tmp_path / "file"
    file.touch()
    common = tiny_gpt(train_iters=None, tensorboard_dir=file / "below")
    with pytest.raises(UltraMemError, match=r"on 1 ranks failed:\n") as refused:
        main(["--ranks", "1", "1", *common, "--", "--"])
    assert "NotADirectoryError" in str(refused.value)
    assert "elastic" not in str(refused.value)


def test_help_needs_no_layouts(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    assert "--tolerance" in capsys.readouterr().out
