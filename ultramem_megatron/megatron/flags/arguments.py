"""The --ultramem-* flags, and their one translation into an UltraMemConfig."""

import re
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from dataclasses import MISSING, fields
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.flags.row_adam_flags import refuse_lazy_adam
from ultramem_megatron.megatron.pipeline.pattern import readable_layers
from ultramem_megatron.memory.config import UltraMemConfig, flag
from ultramem_megatron.memory.initialization import INITIALISATIONS
from ultramem_megatron.memory.retrieval import RETRIEVALS
from ultramem_megatron.memory.spans import parse_spans
from ultramem_megatron.memory.tables.partitions import PARTITIONS, shared_partitions
from ultramem_megatron.memory.validation import CHOICES, validate
from ultramem_megatron.memory.values import VALUES
from ultramem_megatron.presets import MEMORY_PRESETS, preset_fields

_INTEGER_HELP = {
    "num_keys": "Physical keys per side, n; a memory layer holds n*n values.",
    "key_dim": "Width of queries and keys, Dk (default: half the hidden size).",
    "value_dim": "Width of a value, Dv (default: half the hidden size).",
    "topk": "Values read per token and head, m.",
    "side_topk": "Keys of each side whose pairs are scored exactly (0: m of them).",
    "heads": "Key sets H that read one table, each with its own top-m.",
    "tucker_rank": "Rank r of the Tucker-decomposed retrieval (1 with pkm).",
    "cores": "Cores h of multi-core scoring, one score per slice of a value (1 with pkm).",
    "pre_value_dim": "Width of a pre-value, Dp, with --ultramem-values prevalued (0: Dv).",
    "value_expansion": "Virtual values per physical value, E, a square (1: none).",
    "key_expansion": "Addresses of a value, e*e; with E=1 what they bring is added up.",
    "share_values": "So many memories, g, share their values.",
    "query_conv_kernel": "Taps of the causal depthwise convolution before the query projection "
    "(0: none).",
}
_NUMBER_HELP = {
    "aux_loss_weight": "Weight alpha of the penalty on the cores' small singular values (0: none).",
    "aux_loss_margin": "Margin tau below which a singular value is not penalised.",
    "value_lr_mult": "The value tables' learning rate starts at this multiple of the base rate...",
    "value_lr_decay": "...and falls linearly to 1x over this fraction of training.",
    "value_lr_fixed": "The value tables' learning rate itself, whatever the schedule, in place of "
    "the two above (0: none).",
    "value_wd_mult": "The value tables' weight decay is this multiple of that of matrices, at any "
    "point of its schedule (0: none).",
}
_CHOICE_HELP = {
    "retrieval": f"How queries find values: {RETRIEVALS.described()}.",
    "rank_layout": "split: each rank has a slice of the key (paper); full: each has all of it "
    "(authors' code).",
    "qk_norm": "Norm of queries and keys.",
    "share_order": "How memories share values. block: g neighbours read one table of g*n*n; same: "
    "one of n*n; ring, noring: all memories have one table, of which each reads g*n*n, around its "
    "end or stopping there.",
    "pre_value_activation": "Activation of a pre-value's product with the input.",
    "values": f"What is read: {VALUES.described()}.",
    "init": f"Initial values: {INITIALISATIONS.described()}.",
    "table_moments": "How --ultramem-row-adam, or --ultramem-table-memory host, keeps AdamW's "
    "moments. float32: as AdamW, 8 bytes a number; factored, bfloat16, int8: 4, 2 and 1, the mean "
    "in so many bits and one second moment a row.",
    "table_main_params": "With --bf16 and one of the same two: the copy of value tables that AdamW "
    "trains. float32: 4 bytes a number; none: it trains the tables themselves, and rounds up or "
    "down at random.",
}
_SWITCH_HELP = {
    "replace_mlp": "Layers in which memories stand have no MLP (Memory+, PEER).",
    "share_query": "Two heads use one query.",
    "query_per_rank": "Each Tucker rank has queries of its own; needs --ultramem-rank-layout full.",
    "values_per_head": "Every head reads a table of its own.",
    "value_projection": "Project pooled values to the hidden size; needed for value expansion.",
    "query_centering": "Take a running mean over tokens off what queries are projected from, which "
    "keeps the queries of different tokens apart.",
    "projection_bias": "Projections of queries and values, and gates, have a bias.",
    "relu_scores": "ReLU of the scores.",
    "softmax": "Softmax over each head's scores, as product-key memories have it.",
    "row_adam": "AdamW visits only the rows of value tables that a step reads; a row makes the "
    "steps it has missed when it is read, so every result is that of AdamW on all rows. For large "
    "tables of which a step reads a hundredth or less.",
}

_TRAINING = (*_NUMBER_HELP, "row_adam", "table_moments", "table_main_params")
"""Of these, what shapes no tensor and nothing that is read from one."""
_OF_RUNS = ("table_memory", "overlap", "upcycle", "train_only", "train_rows", "background_reads")
"""Flags that are no fields, and do nothing without memories."""
GROUPS = "UltraMem memory layers: "
"""How the titles of our groups begin, in Megatron's --help."""


def whole_number(text: str) -> int:
    """As int(), of plain digits alone: no `1_0`, no digits of other scripts, no endless ones."""
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise ArgumentTypeError(f"{text!r:.40} is no whole number")
    return int(text)


def add_ultramem_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our groups; an `extra_args_provider` for Megatron's argument parser.

    Every flag defaults to None here: unset flags take the preset's value, then the config's.
    """
    group = parser.add_argument_group(
        f"{GROUPS}where they are",
        "Memory layers (arXiv 2411.12364). Without --ultramem-spans or a preset there are none, "
        "and the model is a plain GPT.",
    )
    group.add_argument(
        "--ultramem-spans",
        metavar="A:B/C:D",
        help="Where memories stand: each reads at layer A and its result is added after layer B, "
        "layers counted from 1, for example 3:5/6:8/9:11; 'full' puts one in every layer (of "
        "--hybrid-layer-pattern: every - and E).",
    )
    group.add_argument(
        "--ultramem-preset",
        metavar="NAME",
        help="Fill the flags not given from a named design: " + ", ".join(MEMORY_PRESETS) + ".",
    )
    _add_config_arguments(
        parser.add_argument_group(f"{GROUPS}their design"),
        parser.add_argument_group(f"{GROUPS}their training"),
    )
    refuse_lazy_adam(parser)
    _add_table_arguments(parser.add_argument_group(f"{GROUPS}their tables on many ranks"))
    _add_log_arguments(parser.add_argument_group(f"{GROUPS}in TensorBoard and W&B"))
    _add_start_arguments(parser.add_argument_group(f"{GROUPS}from a trained model"))
    _add_checkpoint_arguments(parser.add_argument_group(f"{GROUPS}their checkpoints"))
    return parser


def _add_config_arguments(design: Any, training: Any) -> None:
    """A flag for each field of UltraMemConfig, in one of two groups."""
    defaults = {field.name: field.default for field in fields(UltraMemConfig)}

    def add(name: str, text: str, **extra: Any) -> None:
        group = training if name in _TRAINING else design
        group.add_argument(flag(name), **extra, help=text + _shown_default(name, defaults[name]))

    for name, text in _INTEGER_HELP.items():
        add(name, text, type=whole_number)
    for name, text in _NUMBER_HELP.items():
        add(name, text, type=float)
    for name, text in _CHOICE_HELP.items():
        add(name, text, choices=CHOICES[name])
    for name, text in _SWITCH_HELP.items():
        add(name, text, action=BooleanOptionalAction)


def _add_log_arguments(group: Any) -> None:
    group.add_argument(
        "--ultramem-log-tables-interval",
        type=whole_number,
        metavar="STEPS",
        help="Every so many steps, a multiple of --log-interval, log of each value table: reads "
        "per value as a histogram, reads of the key grid as a picture, the norm of its gradient, "
        "|update| / |weights| of the step, and what the rank-1 filter misses. At such a step "
        "host memory holds a copy of a rank's tables. Default: never.",
    )


def _add_start_arguments(group: Any) -> None:
    group.add_argument(
        "--ultramem-upcycle",
        metavar="DIR",
        help="Start from the torch_dist checkpoint of a dense GPT: its weights, with memories that "
        "have no effect at first. Where --load holds a checkpoint already, that one is resumed.",
    )
    group.add_argument(
        "--ultramem-train-only",
        choices=("memory",),
        help="memory: freeze everything but the memory layers.",
    )
    group.add_argument(
        "--ultramem-train-rows",
        type=whole_number,
        metavar="T",
        help="Fine-tuning with little forgetting (arXiv 2510.15103): with --ultramem-train-only "
        "memory, a step moves at most T rows of each value table, those that its batch reads and "
        "background text does not, by TF-IDF. Everything else of the model is frozen. Adam or SGD.",
    )
    group.add_argument(
        "--ultramem-background-reads",
        metavar="FILE",
        help="Reads of each row in background text, which `ultramem count` wrote for the model.",
    )


def _add_checkpoint_arguments(group: Any) -> None:
    group.add_argument(
        "--load-or-start",
        action="store_true",
        help="Start from the beginning where --load, the same folder as --save, has no checkpoint "
        "yet. Without it that is an error.",
    )
    group.add_argument(
        "--no-verify-integrity",
        action="store_false",
        dest="verify_integrity",
        help="Save without sums, load unchecked. With memory layers sums are on without a flag, "
        "and a checkpoint that has none is loaded; --verify-integrity refuses it.",
    )
    group.set_defaults(verify_integrity=None)  # neither flag given


def _add_table_arguments(group: Any) -> None:
    group.add_argument(
        "--ultramem-parallel-size",
        type=whole_number,
        metavar="P",
        help="Ranks of a pipeline stage that share each value table; divides tensor x context x "
        "data parallel. Default: all of them, of more than 64 what the cost model says (with "
        "experts: --expert-model-parallel-size).",
    )
    group.add_argument(
        "--ultramem-partition",
        choices=("auto", *shared_partitions()),
        help=f"How they share it: {PARTITIONS.described(shared_partitions())}; auto (default): the "
        "cheaper by bytes moved.",
    )
    group.add_argument(
        "--ultramem-node-size",
        type=whole_number,
        metavar="N",
        help="Neighbouring ranks of a table that share fast links, for --ultramem-partition grid "
        "and auto. Default: the ranks launched on a host.",
    )
    group.add_argument(
        "--ultramem-table-memory",
        choices=("device", "host"),
        help="Where tables and their optimizer state are in training. host: in host memory, for "
        "tables larger than the device; a step brings the rows it reads to the device and their "
        "gradients back, and AdamW visits those rows there, to the result of AdamW on all rows. "
        "Checkpoints are the same. Default: device.",
    )
    group.add_argument(
        "--ultramem-overlap",
        action="store_true",
        help="Compute each memory beside the layers of its span, so that its exchanges between "
        "ranks travel while the layers compute. Results are the same.",
    )


def _shown_default(name: str, default: Any) -> str:
    if name == "key_expansion":
        return " Default: the root of E."
    if default is None:
        return " Default: with --ultramem-init matched."
    return "" if default is MISSING else f" Default: {default}."


def config_from_args(args: Namespace) -> UltraMemConfig | None:
    """The memory design that the flags ask for, validated; None for a plain GPT.

    Reads `num_layers` and `hidden_size` beside our own flags. Raises UltraMemError.
    """
    given = _given(args)
    preset = getattr(args, "ultramem_preset", None)
    values = (preset_fields(preset) if preset else {}) | given
    _settle_rate(values, given)
    if "spans" not in values:
        asked_for = [flag(name) for name in given]
        for name in _OF_RUNS:
            if getattr(args, f"ultramem_{name}", None):
                asked_for.append(flag(name))
        if asked_for:
            shown = ", ".join(asked_for)
            raise UltraMemError(
                f"{shown} given, but no memory layer is placed. Add --ultramem-spans, for example "
                f"--ultramem-spans 2:3, or --ultramem-preset."
            )
        return None
    config = UltraMemConfig(**_with_defaults(values, args))
    validate(config, hidden_size=args.hidden_size, num_layers=args.num_layers)
    return config


def _given(args: Namespace) -> dict[str, Any]:
    """Config fields whose flags the user set."""
    found = {
        field.name: getattr(args, f"ultramem_{field.name}", None)
        for field in fields(UltraMemConfig)
    }
    return {name: value for name, value in found.items() if value is not None}


def _settle_rate(values: dict[str, Any], given: dict[str, Any]) -> None:
    """A fixed rate of the tables or one that follows the schedule; a given one beats a preset's."""
    following = [name for name in ("value_lr_mult", "value_lr_decay") if name in given]
    if not following or not values.get("value_lr_fixed"):
        return
    if "value_lr_fixed" in given:
        raise UltraMemError(
            f"{flag('value_lr_fixed')} {given['value_lr_fixed']:g} and {flag(following[0])} "
            f"{given[following[0]]:g} are both given: the tables' learning rate is fixed, or it "
            f"follows the schedule. Drop one of them."
        )
    values["value_lr_fixed"] = 0.0


def _with_defaults(values: dict[str, Any], args: Namespace) -> dict[str, Any]:
    """Add what depends on the transformer or on another flag."""
    values = {"key_dim": args.hidden_size // 2, "value_dim": args.hidden_size // 2} | values
    kind = RETRIEVALS.get(values.get("retrieval", ""))
    values = {**(kind.defaults if kind else {}), **values}
    if "num_keys" not in values:
        raise UltraMemError(
            "--ultramem-num-keys is not given: a memory layer holds its square of values. Give a "
            "number, for example --ultramem-num-keys 128 for 16384 values per layer."
        )
    text = values["spans"]
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern is not None and text.strip() == "full":
        text = "/".join(f"{number}:{number}" for number in readable_layers(pattern))
    spans = parse_spans(text, args.num_layers)
    return values | {"spans": spans, "seed": args.seed}
