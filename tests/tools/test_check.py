"""`ultramem check`: a line for each check, status 0 or 2, on a machine without GPUs."""

from tests.ranks import run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt

_MEMORY = {"ultramem_spans": "1:2", "ultramem_num_keys": 12, "ultramem_topk": 6}


def _checked(*runs):
    """In a process of its own: status and lines, by name, of each run's flags."""
    import contextlib
    import io

    from ultramem_megatron.tools.check import main

    results = []
    for argv in runs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = main(argv)
        lines = (line.split(None, 2) for line in printed.getvalue().splitlines())
        results.append((status, {name: (word, text) for name, word, text in lines}))
    return results


def _checked_with_data(prefix, argv):
    """As `_checked`, of one run, its data having 500 different tokens."""
    from ultramem_megatron.data import indexed

    indexed.write(prefix, [list(range(500))] * 4, 512)
    return _checked(argv)


def test_flags_that_train_pass_every_check(tmp_path):
    argv = tiny_gpt(
        **_MEMORY,
        save=tmp_path,
        load=tmp_path,
        save_interval=2,
        verify_integrity=True,
        ckpt_format="torch_dist",
        load_or_start=True,
    )
    run_pretrain(2, argv)
    (results,) = run_on_ranks(1, _checked, argv, ["--gpus", "4", *argv])
    for (status, lines), ranks in zip(results, (1, 4), strict=True):
        assert status == 0
        assert {word for word, _ in lines.values()} == {"ok"}
        assert lines["flags"][1].startswith(f"{ranks} ranks: 1 tensor x 1 pipeline x {ranks} data")
        assert lines["checkpoint"][1].startswith(
            f"goes on from iter_0000003 of --load {tmp_path}, sums"
        )
        assert " GB on each rank of the fullest stage" in lines["memory"][1]
    assert "over 4 ranks" in results[1][1]["spans"][1]


def test_each_refusal_stands_in_its_line(tmp_path):
    file = tmp_path / "file"
    file.touch()
    wrong = tiny_gpt(
        **_MEMORY,
        mock_data=None,
        data_path="nowhere/data",
        split="1,1,1",
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=tmp_path / "none",
        vocab_size=None,
        save=file / "below",
        save_interval=1,
        eval_interval=None,
    )
    other = tiny_gpt(**{**_MEMORY, "ultramem_spans": "1:9"})
    crossing = tiny_gpt(**_MEMORY, pipeline_model_parallel_size=2)
    (results,) = run_on_ranks(1, _checked, wrong, other, crossing)
    status, lines = results[0]
    assert status == 2
    refused = {name: text for name, (word, text) in lines.items() if word == "REFUSED"}
    assert refused.keys() == {"training", "data", "tokenizer", "memory", "save"}
    assert "--eval-interval is None" in refused["training"]
    assert "nowhere/data.idx: No such file" in refused["data"]
    assert str(tmp_path / "none") in refused["tokenizer"]
    assert results[1] == (2, {"flags": ("REFUSED", results[1][1]["flags"][1])})
    assert "span 1:9 leaves the model" in results[1][1]["flags"][1]
    assert results[2][0] == 0
    assert "spans cross stages" in results[2][1]["spans"][1]


def test_data_of_another_tokenizer_are_refused(tmp_path):
    flags = tiny_gpt(**_MEMORY, mock_data=None, train_data_path=tmp_path / "data", vocab_size=100)
    ((checked,),) = run_on_ranks(1, _checked_with_data, tmp_path / "data", flags)
    status, lines = checked
    assert status == 2
    assert {name for name, (word, _) in lines.items() if word == "REFUSED"} == {"data"}
    assert "vocabulary" in lines["data"][1]
