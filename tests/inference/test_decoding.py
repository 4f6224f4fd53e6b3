"""Decoding with a KV cache equals the full forward: every kind of model, one rank and several."""

import argparse

import pytest
import torch

from tests.closeness import assert_close
from tests.decoding import (
    KINDS,
    LOGITS,
    NumberTokenizer,
    cached_logits,
    dynamic_logits,
    full_logits,
    random_model,
)
from tests.ranks import RanksFailed, run_on_ranks
from tests.training_runs import make_saving_fast

_PREFILL = 5
_LAYOUTS = {
    "tensor, by number": (2, 2, "number"),
    "tensor, by dimension": (2, 2, "dimension"),
    "tensor, whole tables": (2, 1, "auto"),
}


def _tokens():
    return torch.randint(500, (3, 12), generator=torch.Generator().manual_seed(0))


def _logits(model):
    """Of a full forward, of static and of dynamic batching; the message where that is refused."""
    from ultramem_megatron.errors import UltraMemError

    tokens = _tokens()
    try:
        dynamic = dynamic_logits(model, tokens, _PREFILL)
    except UltraMemError as refusal:
        dynamic = str(refusal)
    return full_logits(model, tokens), cached_logits(model, tokens, _PREFILL), dynamic


def _save(folder, kinds=tuple(KINDS)):
    """Save an untrained model of each kind; what it computes."""
    from ultramem_megatron.megatron.checkpoint.weights import save_weights
    from ultramem_megatron.memory.layer import memory_layers

    make_saving_fast()
    results = {}
    for kind in kinds:
        model, args = random_model(kind)
        save_weights(model, args, folder / kind)
        results[kind] = _logits(model)
        for layer in memory_layers(model):
            layer.values.weight.data.zero_()
        results[kind] += (full_logits(model, _tokens()),)
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_on_ranks(1, _save, folder)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_equals_the_full_forward(saved, kind):
    whole, cached, dynamic, without_values = saved[1][kind]
    assert_close(cached, whole[:, _PREFILL - 1 :], LOGITS)
    assert_close(dynamic, whole[:, _PREFILL - 1 :], LOGITS)
    if "ultramem_spans" in KINDS[kind]:  # else the comparison would say nothing of memories
        assert (without_values - whole).norm() > 0.05 * whole.norm()


def _load_and_compute(folder, kinds, layouts):
    from ultramem_megatron.inference.layout import InferenceLayout
    from ultramem_megatron.inference.loading import load_for_inference

    results = {}
    for kind in kinds:
        for name, layout in layouts.items():
            model = load_for_inference(str(folder / kind), layout=InferenceLayout(*layout)).model
            results[kind, name] = _logits(model)
    return results


def test_ranks_that_share_a_model_decode_what_one_rank_does(saved):
    folder, expected = saved
    for rank in run_on_ranks(2, _load_and_compute, folder, tuple(KINDS), _LAYOUTS):
        assert len(rank) == len(KINDS) * len(_LAYOUTS)
        for (kind, layout), (whole, cached, dynamic) in rank.items():
            assert_close(whole, expected[kind][0], LOGITS, f"{kind} {layout}")
            wanted = expected[kind][0][:, _PREFILL - 1 :]
            assert_close(cached, wanted, LOGITS, f"{kind} {layout}, cached")
            if kind == "moe-ultramem" and _LAYOUTS[layout][1] > 1:
                assert "experts are shared by 2 ranks is not supported" in dynamic
            else:
                assert_close(dynamic, wanted, LOGITS, f"{kind} {layout}, dynamic batching")


@pytest.mark.long
def test_a_grid_decodes_what_one_rank_does(saved):
    kinds = ("ultramem-conv", "ultramemv2")
    grid = {"grid": (2, 4, "grid", "device", 2)}
    for rank in run_on_ranks(4, _load_and_compute, saved[0], kinds, grid):
        for kind in kinds:
            whole, cached, dynamic = rank[kind, "grid"]
            expected = saved[1][kind][0]
            assert_close(whole, expected, LOGITS, kind)
            for logits in (cached, dynamic):
                assert_close(logits, expected[:, _PREFILL - 1 :], LOGITS, kind)


@pytest.fixture(scope="module", params=["hybrid", "mamba"])
def hybrid(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    kind = request.param
    return folder, kind, run_on_ranks(1, _save, folder, (kind,))[0][kind]


def test_a_hybrid_model_decodes_its_full_forward(hybrid):
    _, _, (whole, cached, dynamic, without_values) = hybrid
    assert (without_values - whole).norm() > 0.05 * whole.norm()
    wanted = whole[:, _PREFILL - 1 :]
    for name, logits in (("cached", cached), ("dynamic", dynamic)):
        assert_close(logits, wanted, LOGITS, name)


@pytest.mark.long
def test_ranks_that_share_a_hybrid_model_decode_what_one_rank_does(hybrid):
    folder, kind, (whole, *_) = hybrid
    wanted = whole[:, _PREFILL - 1 :]
    for rank in run_on_ranks(2, _load_and_compute, folder, (kind,), _LAYOUTS):
        for (_, layout), (again, cached, dynamic) in rank.items():
            assert_close(again, whole, LOGITS, layout)
            assert_close(cached, wanted, LOGITS, f"{layout}, cached")
            assert_close(dynamic, wanted, LOGITS, f"{layout}, dynamic batching")


def _premultiplied_logits(folder, kind, layout):
    """Of cached decoding; the message if the layout is refused."""
    from ultramem_megatron.errors import UltraMemError
    from ultramem_megatron.inference.layout import InferenceLayout
    from ultramem_megatron.inference.loading import load_for_inference

    try:
        model = load_for_inference(
            str(folder / kind), layout=InferenceLayout(*layout), premultiply_values=True
        ).model
    except UltraMemError as refusal:
        return str(refusal)
    return cached_logits(model, _tokens(), _PREFILL)


def test_values_multiplied_beforehand_decode_the_same(saved):
    folder, expected = saved
    for kind in ("ultramem", "ultramem-conv", "pkm"):
        for layout in ((1, 1, "auto"), (2, 1, "auto")):
            for logits in run_on_ranks(layout[0], _premultiplied_logits, folder, kind, layout):
                wanted = expected[kind][0][:, _PREFILL - 1 :]
                assert_close(logits, wanted, LOGITS, f"{kind} {layout}")
    for refusal in run_on_ranks(2, _premultiplied_logits, folder, "ultramem", (2, 2, "auto")):
        assert "each value table is shared by 2 ranks. Use --ultramem-parallel-size 1" in refusal


def _options(tokens, layout, batching):
    names = ("tensor_parallel_size", "ultramem_parallel_size", "ultramem_partition")
    return argparse.Namespace(
        tokens=tokens,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=1,
        batching=batching,
        table_memory="device",
        table_cache_rows=None,
        table_format=None,
        table_block=None,
        ultramem_node_size=None,
        **dict(zip(names, layout, strict=True)),
    )


def _generate(folder, prompt_lists, layouts, batching="static", kind="ultramem-conv"):
    from ultramem_megatron.inference.layout_flags import layout_from
    from ultramem_megatron.inference.loading import load_for_inference
    from ultramem_megatron.inference.sampling import generate

    results = []
    for layout in layouts:
        options = _options(9, layout, batching)
        loaded = load_for_inference(str(folder / kind), layout=layout_from(options))
        loaded = loaded._replace(tokenizer=NumberTokenizer())
        texts = [generate(loaded, prompts, options) for prompts in prompt_lists]
        results.append([[text.strip() for text in batch] for batch in texts])
    return results


def test_ranks_with_prompts_of_their_own_may_share_tables(saved):
    """Unequal lengths, unequal numbers of steps, and ranks that have no prompt at all."""
    folder, prompt_lists = saved[0], [["3 5 7", "8", "40 41 42 43 44 45 46"], ["9 8 7"]]
    expected = run_on_ranks(1, _generate, folder, prompt_lists, [(1, 1, "auto")])[0][0]
    assert [len(texts) for texts in expected] == [3, 1]
    assert len({text for texts in expected for text in texts}) == 4
    two = run_on_ranks(
        2,
        _generate,
        folder,
        prompt_lists,
        [(1, 2, "number"), (1, 2, "dimension"), (2, 2, "number"), (1, 1, "auto")],
    )
    four = run_on_ranks(4, _generate, folder, prompt_lists, [(2, 4, "number")])
    dynamic = run_on_ranks(
        4, _generate, folder, prompt_lists, [(2, 4, "number"), (1, 4, "dimension")], "dynamic"
    )
    for rank in [*two, *four, *dynamic]:
        for texts in rank:
            assert texts == expected


def test_ranks_with_prompts_of_their_own_may_share_pre_values(saved):
    folder, prompt_lists = saved[0], [["3 5 7", "8", "40 41 42 43"], ["9 8 7"]]
    one, two = (
        run_on_ranks(size, _generate, folder, prompt_lists, layouts, "static", "ultramemv2")
        for size, layouts in ((1, [(1, 1, "auto")]), (2, [(1, 2, "number"), (1, 2, "dimension")]))
    )
    for rank in two:
        for texts in rank:
            assert texts == one[0][0]


@pytest.mark.parametrize(
    ("kind", "layout", "message"),
    [
        ("dense", (3, None, "auto"), "--tensor-model-parallel-size 3: it must divide the 2 ranks"),
        ("ultramem", (2, 3, "auto"), "--ultramem-parallel-size 3: it must divide the 2 ranks"),
        (
            "moe-ultramem",
            (1, 2, "auto"),
            "with experts it must divide --tensor-model-parallel-size 1",
        ),
    ],
)
def test_impossible_layouts_are_refused(saved, kind, layout, message):
    with pytest.raises(RanksFailed, match=message):
        run_on_ranks(2, _load_and_compute, saved[0], (kind,), {"": layout})
