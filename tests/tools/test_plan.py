"""Sizes of presets against formulas, and layouts against what they must add up to and real runs."""

import json
from unittest import mock

import pytest

from tests.kernels.compiler import needs_compiler
from tests.ranks import run_on_ranks
from tests.training_runs import run_pretrain

_PRESETS = (
    "dense-151m",
    "moe-151m-2in32",
    "dense-1.6b",
    "moe-1.6b-2in34",
    "ultramem-1.6b-x12",
    "dense-6.5b",
)


def _sizes_of_presets():
    """From one process that builds each once."""
    from ultramem_megatron.tools.plan.sizes import describe_sizes, preset_sizes

    return {name: describe_sizes(preset_sizes(name), 2, 2048) for name in _PRESETS}


def _plan(*args):
    from ultramem_megatron.tools.plan.__main__ import make_plan

    return make_plan(*args)


def _refusal(*args):
    from ultramem_megatron.errors import UltraMemError
    from ultramem_megatron.tools.plan.__main__ import main

    try:
        main(args)
    except UltraMemError as error:
        return str(error)
    return None


def _printed(*argv):
    import contextlib
    import io

    from ultramem_megatron.tools.plan.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()) as output:
        main(argv)
    return output.getvalue()


def _run(function, *args):
    return run_on_ranks(1, function, *args)[0]


@pytest.fixture(scope="module")
def plans():
    return _run(_sizes_of_presets)


def test_all_that_a_step_reads(plans):
    """Weights beside MLPs and values, and the KV cache of as many heads as there are queries'."""
    for name, layers, hidden in (("dense-1.6b", 32, 2048), ("ultramem-1.6b-x12", 32, 2048)):
        plan = plans[name]
        assert plan["cache_length"] == 2048
        others = plan["dense_params"] - layers * 8 * hidden**2 + plan["uncounted_params"]
        head = plan["embedding_params"] // 2
        for batch, everything in plan["step_bytes_read"].items():
            cache = int(batch) * 2048 * layers * 2 * hidden
            counted = plan["weight_bytes_read"][batch]
            assert everything == counted + 2 * (others + head + cache)
    moe, ultramem = (
        plans[name]["step_bytes_read"] for name in ("moe-1.6b-2in34", "ultramem-1.6b-x12")
    )
    ratios = [f"{moe[batch] / ultramem[batch]:.1f}" for batch in ultramem]
    assert ratios == ["1.0", "2.3", "4.0", "2.0", "1.3", "1.1"]  # in the README


def test_a_small_cache_leaves_more_to_the_weights():
    """Two heads of keys and values instead of 16: the other row of the README."""
    two_heads = ("--group-query-attention", "--num-query-groups", "2")
    moe, ultramem, dense = (
        _run(_plan, name, two_heads)["step_bytes_read"]
        for name in ("moe-1.6b-2in34", "ultramem-1.6b-x12", "dense-1.6b")
    )
    ratios = [f"{moe[batch] / ultramem[batch]:.1f}" for batch in ultramem]
    assert ratios == ["1.0", "3.1", "9.5", "6.2", "2.9", "1.5"]
    assert f"{max(ultramem[batch] / dense[batch] for batch in dense):.2f}" == "1.09"


def test_dense_models_have_12_l_d_squared(plans):
    for name, layers, hidden in (("dense-151m", 12, 1024), ("dense-6.5b", 32, 4096)):
        assert plans[name]["dense_params"] == 12 * layers * hidden**2
        assert plans[name]["sparse_params"] == 0
        assert plans[name]["flops_per_token"] == 24 * layers * hidden**2


def test_experts_count_once_for_the_model_and_twice_for_a_token(plans):
    plan, one_expert = plans["moe-151m-2in32"], 12 * 2 * 1024 * 2528
    assert plan["sparse_params"] == 32 * one_expert
    assert plan["activated_params"] == 12 * 4 * 1024**2 + 2 * one_expert


_TINY = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --vocab-size 1024 --micro-batch-size 2 "
    "--global-batch-size 32 --bf16 "
)
_MEMORY = "--ultramem-spans 1:2/3:4 --ultramem-num-keys 24 --ultramem-topk 6 "
_EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 96 "


def _layout(flags, gpus):
    return _run(_plan, None, (_TINY + flags).split(), [gpus])


def _everything(plan):
    keys = ("dense_params", "sparse_params", "embedding_params", "uncounted_params")
    return sum(plan[key] for key in keys)


def test_one_rank_holds_everything_in_the_bytes_of_mixed_precision():
    plan = _layout(_MEMORY, 1)
    stage = plan["layouts"][0]["stages"][0]
    assert stage["parameters"] == 2 * _everything(plan)
    assert stage["gradients"] == 4 * _everything(plan)
    assert stage["optimizer"] == 12 * _everything(plan)
    assert stage["received"] == {}
    assert stage["memory"] == sum(
        stage[key] for key in ("parameters", "gradients", "optimizer", "activations")
    )


def test_tables_in_host_memory_are_counted_there():
    device, host = (_layout(_MEMORY + more, 1) for more in ("", "--ultramem-table-memory host "))
    sparse = device["sparse_params"]
    before, after = (plan["layouts"][0]["stages"][0] for plan in (device, host))
    assert after["host"] == sparse * (2 + 4 + 12)  # bfloat16, gradient, AdamW and a float32 copy
    assert before["host"] == 0
    for key, each in (("parameters", 2), ("gradients", 4), ("optimizer", 12)):
        assert before[key] - after[key] == each * sparse
    # 64 tokens, 12 picks each, are more than the 576 rows of a table: all of them come.
    assert after["activations"] - before["activations"] == 2 * sparse


@pytest.mark.parametrize(
    ("where", "counted"),
    [("--ultramem-row-adam", "optimizer"), ("--ultramem-table-memory host", "host")],
)
def test_smaller_moments_of_tables_are_counted(where, counted):
    before, after = (
        _layout(_MEMORY + f"{where} --ultramem-table-moments {kind} ", 1)
        for kind in ("float32", "int8")
    )
    bytes_ = [plan["layouts"][0]["stages"][0][counted] for plan in (before, after)]
    assert bytes_[0] - bytes_[1] == 7 * before["sparse_params"]


def test_flags_that_need_transformer_engine_change_nothing():
    plain, engine = (
        _layout(_EXPERTS + more, 2)
        for more in ("", "--moe-grouped-gemm --transformer-impl transformer_engine")
    )
    assert engine == plain


def test_stages_and_parts_of_tables_add_up_to_the_model():
    plan = _layout(_MEMORY + "--pipeline-model-parallel-size 2", 8)
    layout = plan["layouts"][0]
    held = sum(stage["parameters"] for stage in layout["stages"]) // 2
    assert (layout["table_parallel"], layout["data_parallel"]) == (4, 4)
    assert held == _everything(plan) - plan["sparse_params"] * 3 // 4
    assert [stage["layers"] for stage in layout["stages"]] == ["1-2", "3-4"]


def _held(trained):
    """Bytes of parameters, gradients and optimizer state on a rank of a real run."""
    import torch

    parameters = [p for chunk in trained.model for p in chunk.parameters()]
    optimizers = getattr(trained.optimizer, "chained_optimizers", [trained.optimizer])
    state = [
        tensor
        for optimizer in optimizers
        for entry in optimizer.optimizer.state.values()
        for name, tensor in entry.items()
        if name != "step"
    ]
    copies = [
        p for optimizer in optimizers for group in optimizer.fp32_from_float16_groups for p in group
    ]
    assert all(isinstance(tensor, torch.Tensor) for tensor in state)
    return tuple(
        sum(t.numel() * t.element_size() for t in tensors)
        for tensors in (
            parameters,
            [p.main_grad for p in parameters if p.requires_grad],
            [*state, *copies],
        )
    )


_ONE_STEP = (
    "--train-iters 1 --lr 1e-4 --mock-data --tokenizer-type NullTokenizer --eval-iters 0 "
    "--eval-interval 9 --num-workers 0 --hidden-dropout 0 --attention-dropout 0"
)


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        (_MEMORY + "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 ", 4),
        (_EXPERTS + "--expert-model-parallel-size 2 ", 2),
        (_MEMORY + "--context-parallel-size 2 ", 2),
        (_MEMORY + "--ultramem-train-only memory ", 1),
    ],
)
def test_ranks_of_a_real_run_hold_what_is_planned(flags, ranks):
    run = run_pretrain(ranks, (_TINY + flags + _ONE_STEP).split(), on_finish=_held)
    stages = _layout(flags, ranks)["layouts"][0]["stages"]
    planned = [
        tuple(stage[key] for key in ("parameters", "gradients", "optimizer"))
        for stage in stages
        for _ in range(ranks // len(stages))
    ]
    assert [rank.finished for rank in run.ranks] == planned


def _rows_of_values(folder):
    """A plan where tables alone are trained; and elements of them."""
    import torch

    from ultramem_megatron.megatron.background_reads import BackgroundReads, TableReads

    nothing = torch.zeros(24**2, dtype=torch.int64)
    file = folder / "reads.npz"
    BackgroundReads(1, {table: TableReads(nothing, nothing) for table in (1, 3)}).write(file)
    flags = f"--ultramem-train-rows 8 --ultramem-background-reads {file} "
    return _plan(None, (_TINY + _MEMORY + flags + "--ultramem-train-only memory").split(), [1])


def test_only_what_is_trained_has_gradients_and_a_state(tmp_path):
    plan = _run(_rows_of_values, tmp_path)
    stage = plan["layouts"][0]["stages"][0]
    assert stage["parameters"] == 2 * _everything(plan)
    assert stage["gradients"] == 4 * plan["sparse_params"]
    assert stage["optimizer"] == 12 * plan["sparse_params"]


def test_the_distributed_optimizer_spreads_its_state_and_changes_what_is_sent():
    plain, spread = (
        _layout(flags, 4)["layouts"][0]["stages"][0]
        for flags in ("", "--use-distributed-optimizer")
    )
    assert spread["optimizer"] == plain["optimizer"] / 4
    elements = plain["parameters"] // 2
    # Rings: gradients in fp32 both ways, or gradients in fp32 one way and bf16 parameters back.
    assert plain["received"]["gradients and parameters"] == elements * 8 * 3 // 4
    assert spread["received"]["gradients and parameters"] == elements * 6 * 3 // 4


@pytest.mark.parametrize("partition", ["dimension", "number"])
def test_bytes_of_value_tables_are_those_of_the_cost_model(partition):
    from ultramem_megatron.memory.tables.partitions import PARTITIONS
    from ultramem_megatron.memory.tables.traffic import Exchange

    flags = _MEMORY + f"--ultramem-partition {partition} --ultramem-parallel-size 2"
    layout = _layout(flags, 4)["layouts"][0]
    exchange = Exchange(size=2, picks=12, value_dim=32, expansion=4, cores=2, number_bytes=2)
    volume = PARTITIONS[partition].volume(exchange)
    tokens_per_rank = 32 * 32 // 4
    expected = 2 * tokens_per_rank * volume.total
    received = layout["stages"][0]["received"]["value tables"]
    assert received == pytest.approx(expected, abs=4 / 2)  # each of 4 micro-batches is rounded


def test_tensor_parallel_bytes_of_a_dense_layer():
    received = _layout("--tensor-model-parallel-size 2", 2)["layouts"][0]["stages"][0]["received"]
    hidden = 32 * 2 * 64 * 2  # sequence x micro-batch x hidden, bf16
    layers = 4 * 4 * hidden  # two all-reduces forward and two backward in each
    vocabulary = 2 * hidden  # the embedding's forward, the output layer's backward
    # In float32, of each token: the largest logit, the target's, the sum of exponentials.
    loss = 3 * 32 * 2 * 4
    assert received["tensor parallel"] == 16 * (layers + vocabulary + loss)  # micro-batches


# Normalised keys, and by what mean and deviation each was: 2 heads, 2 sides, 48 keys.
_KEYS = 2 * 2 * 48 * (32 * 2 + 2 * 4)
_CORES_OF_RANKS = 2 * 1 * 8  # which cores' scores go to which of 2 ranks


@pytest.mark.parametrize(
    ("flags", "of_no_token"),
    [
        ("", 0),
        (_MEMORY + "--ultramem-partition dimension ", 2 * (_KEYS + _CORES_OF_RANKS)),
        (_MEMORY + "--ultramem-partition number ", 2 * _KEYS),
    ],
)
def test_context_parallel_ranks_keep_their_share_and_receive_keys_and_values(flags, of_no_token):
    whole, half = (
        _layout(flags + f"--context-parallel-size {size}", 2)["layouts"][0] for size in (1, 2)
    )
    assert (half["context_parallel"], half["data_parallel"]) == (2, 1)
    one, two = whole["stages"][0], half["stages"][0]
    for same in ("parameters", "gradients", "optimizer"):
        assert one[same] == two[same]
    assert two["activations"] - of_no_token == (one["activations"] - of_no_token) / 2
    # As many tokens pass a rank in a step: half of each sequence, of twice the sequences.
    for same in one["received"]:
        assert two["received"][same] == one["received"][same]
    keys_and_values = 2 * 64 * 2  # of the tiny width in bf16
    tokens, layers = 32 * 32 // 2, 4
    assert two["received"]["context parallel"] == 3 * layers * tokens * keys_and_values
    assert "context parallel" not in one["received"]


@pytest.mark.parametrize("flags", ["", _MEMORY, _EXPERTS])
def test_activations_grow_with_the_micro_batch_and_shrink_with_recomputation(flags):
    def kept(more):
        return _layout(flags + more, 1)["layouts"][0]["stages"][0]["activations"]

    two, four, eight = (kept(f"--micro-batch-size {size}") for size in (2, 4, 8))
    assert eight - four == 2 * (four - two) > 1.8 * two
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    five, six = (kept(f"{full} --num-layers {layers}") for layers in (5, 6))
    assert six - five == 32 * 2 * 64 * 2  # its input is all that such a layer keeps


@needs_compiler  # the plan is that of compiled kernels
def test_kept_activations_are_those_of_a_real_forward_pass():
    """A step on real data keeps what the plan says, but for scores of attention."""
    flags = (_TINY.replace("--bf16", "") + _MEMORY).split()
    planned, measured = _run(_kept_for_real, flags)
    assert measured == pytest.approx(planned, rel=0.005)


def _kept_for_real(flags):
    import torch
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from ultramem_megatron.tools.plan.build import built_stage, command_line, parse
    from ultramem_megatron.tools.plan.shapes_only import attention_of_shapes
    from ultramem_megatron.tools.plan.stage_cost import stage_cost

    run = parse(command_line(None, flags), 1)
    planned = stage_cost(run, 0).activations
    with built_stage(run) as (chunk,), mock.patch("torch.cuda.current_device", return_value="cpu"):
        chunk = chunk.to_empty(device="cpu")
        for tensor in (*chunk.parameters(), *chunk.buffers()):
            if tensor.is_floating_point():
                torch.nn.init.normal_(tensor, std=0.02)
            else:
                tensor.zero_()
        for module in chunk.modules():
            if isinstance(module, DotProductAttention):
                module.forward = attention_of_shapes([])
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        tokens = torch.randint(1000, (2, 32))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            chunk(tokens, tokens, None, labels=tokens)
    own = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    return planned, sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in own)


def test_an_early_stage_keeps_more_micro_batches():
    first, last = _layout("--pipeline-model-parallel-size 2", 2)["layouts"][0]["stages"]
    one = 32 * 2 * 64  # elements of a hidden state
    assert first["received"]["pipeline"] == last["received"]["pipeline"] == 16 * 2 * one
    alone = _layout("--pipeline-model-parallel-size 2 --global-batch-size 2", 2)["layouts"][0]
    assert first["activations"] == 2 * alone["stages"][0]["activations"]


def test_layouts_without_crossing_spans_are_given_and_used():
    flags = _MEMORY.replace("1:2/3:4", "1:1/2:4") + "--pipeline-model-parallel-size 2 "
    plan = _layout(flags, 2)
    crossing = plan["layouts"][0]
    assert crossing["spans_cross_stages"]
    assert crossing["layout_without_crossing"] == plan["pipeline_layouts"]["2"] == "Et|t*3L"
    better = _layout(flags + "--pipeline-model-parallel-layout Et|t*3L", 2)["layouts"][0]
    assert not better["spans_cross_stages"]
    wide, narrow = (at["stages"][0]["received"]["pipeline"] for at in (crossing, better))
    assert wide == 2 * narrow


def test_json_is_one_object_of_plain_numbers():
    plan = json.loads(_run(_printed, "ultramem-151m-x12", "--json", "--gpus", "8", "16"))
    for key in ("total_params", "dense_params", "sparse_params", "flops_per_token"):
        assert type(plan[key]) is int
    assert plan["total_params"] == plan["dense_params"] + plan["sparse_params"]
    assert [layout["gpus"] for layout in plan["layouts"]] == [8, 16]
    fewer, more = (layout["memory_bytes_per_rank"] for layout in plan["layouts"])
    assert more < fewer


def test_text_names_what_is_inferred_and_what_the_paper_prints():
    text = _run(_printed, "ultramem-1.6b-x12", "--tensor-model-parallel-size", "2")
    assert "--ultramem-num-keys" in text.splitlines()[1]
    assert "inferred" in text.splitlines()[1]
    assert "the paper prints 21.41 B parameters, 3.50 G FLOPs" in text
    assert "2 GPUs: 2 tensor x 1 pipeline x 1 data; tables over 2, dimension-wise" in text
    assert "Et*17|t*15L" in text


def _patched_by_import():
    import ultramem_megatron.tools.paper.tables
    import ultramem_megatron.tools.plan.stage_cost  # noqa: F401 - imports are what is tried
    from ultramem_megatron.patches import registry

    return [patch.name for patch in registry.all_patches() if registry.is_applied(patch.name)]


def test_importing_a_plan_patches_nothing():
    assert _run(_patched_by_import) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("ultramem-2b", "Preset 'ultramem-2b' is unknown. Known presets: dense-151m"),
        ("", "Nothing to plan: give a preset"),
        ("dense-151m --hiden-size 3", "Wrong flags: unrecognized arguments: --hiden-size 3"),
        ("dense-151m --hidden-size big", "Wrong flags: argument --hidden-size: invalid int"),
        ("dense-151m --gpus 3 --tensor-model-parallel-size 2", "Megatron refuses these flags: "),
        ("dense-151m --gpus 0", "--gpus has 0; numbers of ranks must be at least 1"),
        ("ultramem-151m-x12 --ultramem-topk 0", "--ultramem-topk is 0"),
        ("--figure=f.png", "--figure of plan is a command of its own now: ultramem paper figure1c"),
    ],
)
def test_what_cannot_be_planned_is_refused(argv, message):
    assert message in _run(_refusal, *argv.split())
