"""Run a script of Megatron-LM's unedited, with memory layers: its flags and ours.

    torchrun ... -m ultramem_megatron run path/to/pretrain_gpt.py <its flags> --ultramem-...

Written for pretrain_gpt.py and pretrain_hybrid.py of Megatron-LM 0.19: they parse their flags with
`parse_and_validate_args`, make a model config with `gpt_config_from_args` or
`hybrid_config_from_args` and hand it to `pretrain()`; its inference scripts hand it to a builder.
All are replaced, where the script imports them from, while it runs.
"""

import contextlib
import functools
import runpy
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ultramem_megatron.errors import UltraMemError, exit_on_user_error
from ultramem_megatron.megatron.flags import machine_flags
from ultramem_megatron.megatron.flags.late_arguments import LateArguments
from ultramem_megatron.megatron.flags.process import open_process

_USAGE = "ultramem run path/to/pretrain_gpt.py <its flags> --ultramem-..."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script named first in `argv` (None: the command line) with the flags after it.

    Raises UltraMemError for a missing script, a wrong flag, or a script that asks for memory layers
    but trains a model that this package does not know to give them to.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    script = _script(given)
    open_process()
    sys.argv = [str(script), *given[1:]]
    # As for a script started by itself: its folder comes first, for its own imports.
    sys.path.insert(0, str(script.parent))
    with _roads(script):
        runpy.run_path(str(script), run_name="__main__")


def _script(given: Sequence[str]) -> Path:
    if given and given[0] in ("-h", "--help"):
        print(f"usage: {_USAGE}\n\n{__doc__}")
        sys.exit(0)
    if not given or given[0].startswith("-"):
        raise UltraMemError(f"no script is given. Use: {_USAGE}")
    script = Path(given[0]).resolve()
    if not script.is_file():
        raise UltraMemError(f"{given[0]}: no such script. Use: {_USAGE}")
    return script


@contextlib.contextmanager
def _roads(script: Path) -> Iterator[None]:
    """While the script runs, its flags, model config, builder and `pretrain()` are ours."""
    from megatron import training
    from megatron.training import argument_utils, arguments, checkpointing
    from megatron.training.models import GPTModelBuilder, HybridModelBuilder

    running, late = contextlib.ExitStack(), LateArguments()
    places: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
        (arguments, "parse_args", _with_machine_flags),
        (arguments, "parse_and_validate_args", functools.partial(_with_our_flags, running, late)),
        (argument_utils, "gpt_config_from_args", functools.partial(_with_memories, script)),
        (argument_utils, "hybrid_config_from_args", functools.partial(_with_memories, script)),
        (GPTModelBuilder, "__init__", functools.partial(_becomes_ours, GPTModelBuilder)),
        (HybridModelBuilder, "__init__", functools.partial(_becomes_ours, HybridModelBuilder)),
        (checkpointing, "_load_base_checkpoint", _no_memories_left_out),
        (training, "pretrain", functools.partial(_checked, script, late)),
    )
    before = [getattr(owner, name) for owner, name, _ in places]
    try:
        for (owner, name, wrap), original in zip(places, before, strict=True):
            setattr(owner, name, wrap(original))
        with running:
            yield
    finally:
        for (owner, name, _), original in zip(places, before, strict=True):
            setattr(owner, name, original)


def _with_machine_flags(original: Callable[..., Namespace]) -> Callable[..., Namespace]:
    """Megatron's parser finds what this machine needs besides; a script's own parser does not."""

    @functools.wraps(original)
    def parse_args(*given: Any, **kw: Any) -> Namespace:
        sys.argv[1:] = machine_flags.complete(sys.argv[1:])
        return original(*given, **kw)

    return parse_args


def _with_our_flags(
    running: contextlib.ExitStack, late: LateArguments, original: Callable[..., Namespace]
) -> Callable[..., Namespace]:
    """Megatron's parser with our flags; from then on --save is held until `running` ends.

    The list of arguments is left to `late`.
    """
    from ultramem_megatron.faults.run_lock import only_run
    from ultramem_megatron.megatron.flags.arguments import add_ultramem_arguments
    from ultramem_megatron.megatron.flags.refused_by_megatron import megatron_refuses

    @functools.wraps(original)
    def parse_and_validate_args(extra_args_provider: Any = None, *rest: Any, **kw: Any) -> Any:
        def both(parser: ArgumentParser) -> ArgumentParser:
            parser = parser if extra_args_provider is None else extra_args_provider(parser)
            return add_ultramem_arguments(parser)

        with megatron_refuses(), late.held():
            args = original(both, *rest, **kw)
        running.close()  # of a script that parses twice
        running.enter_context(only_run(None if args.skip_train else args.save))
        return args

    return parse_and_validate_args


def _with_memories(script: Path, original: Callable[..., Any]) -> Callable[..., Any]:
    from ultramem_megatron.megatron.flags.embedding_ranks import get_embedding_ranks
    from ultramem_megatron.megatron.model_from_flags import model_config_from_args

    @functools.wraps(original)
    def config_from_args(args: Namespace, *rest: Any, **kw: Any) -> Any:
        # Megatron has a HybridModel's layers of Transformer Engine alone.
        needs_layers = args.hybrid_layer_pattern is not None and args.transformer_impl == "local"
        if not (_asks_for_memories(args) or needs_layers):
            return original(args, *rest, **kw)
        if rest or kw:
            raise UltraMemError(
                f"{script.name} builds its model from a config of its own "
                f"({', '.join([*map(str, rest), *kw])}), which has no place for memory layers. See "
                f"'In your own code' in ultramem_megatron/README.md."
            )
        _check_pattern(script, original.__name__, args.hybrid_layer_pattern)
        return model_config_from_args(args, get_embedding_ranks)

    return config_from_args


def _check_pattern(script: Path, maker: str, pattern: str | None) -> None:
    """A pattern describes a HybridModel, which a script for GPTs cannot train, and vice versa."""
    if maker == "gpt_config_from_args" and pattern is not None:
        raise UltraMemError(
            f"--hybrid-layer-pattern {pattern}: {script.name} trains a GPT. Use "
            f"pretrain_hybrid.py, or drop the flag."
        )
    if maker == "hybrid_config_from_args" and pattern is None:
        raise UltraMemError(
            f"{script.name} trains a HybridModel, but --hybrid-layer-pattern is not given. Give "
            f"one, for example *-*-*-*-, or use pretrain_gpt.py."
        )


def _becomes_ours(
    of_megatron: type, original: Callable[[Any, Any], None]
) -> Callable[[Any, Any], None]:
    """A builder of Megatron's that a script makes itself, for a model config of ours."""
    from ultramem_megatron.megatron.model import MemoryModelBuilder, MemorySettings

    @functools.wraps(original)
    def build_from(self: Any, model_config: Any) -> None:
        if not isinstance(model_config, MemorySettings) or isinstance(self, MemoryModelBuilder):
            original(self, model_config)
            return
        ours = model_config.get_builder_cls()
        if type(self) is not of_megatron:
            raise UltraMemError(
                f"{type(self).__name__} would build a model without memory layers. Derive it from "
                f"{ours.__name__} ({ours.__module__}), or drop the --ultramem-* flags."
            )
        self.__class__ = ours
        ours.__init__(self, model_config)

    return build_from


def _no_memories_left_out(original: Callable[..., Any]) -> Callable[..., Any]:
    """Loading refuses a checkpoint with memory layers for a model without."""
    from ultramem_megatron.megatron.checkpoint.design import refuse_memories_left_out

    @functools.wraps(original)
    def _load_base_checkpoint(load_dir: Any, args: Namespace, *rest: Any, **kw: Any) -> Any:
        if kw.get("sharded_state_dict") is not None:
            refuse_memories_left_out(load_dir, args)
        return original(load_dir, args, *rest, **kw)

    return _load_base_checkpoint


def _checked(script: Path, late: LateArguments, original: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.training import get_args

    from ultramem_megatron.data.check import check_data
    from ultramem_megatron.megatron.checkpoint.source import named_where_not_finite
    from ultramem_megatron.megatron.in_force import log_settings
    from ultramem_megatron.megatron.model import MemorySettings

    @functools.wraps(original)
    def pretrain(config: Any, *rest: Any, **kw: Any) -> Any:
        model = getattr(config, "model", None)
        if _asks_for_memories(get_args()) and not isinstance(model, MemorySettings):
            raise UltraMemError(
                f"{script.name} asks for memory layers, but does not build its model from "
                f"gpt_config_from_args or hybrid_config_from_args, as pretrain_gpt.py and "
                f"pretrain_hybrid.py of Megatron-LM 0.19 do. See 'In your own code' in "
                f"ultramem_megatron/README.md."
            )
        check_data(get_args())
        late.show()
        if isinstance(model, MemorySettings):
            log_settings(get_args(), model)
        with named_where_not_finite(get_args()):
            return original(config, *rest, **kw)

    return pretrain


def _asks_for_memories(args: Namespace) -> bool:
    from ultramem_megatron.megatron.flags.arguments import config_from_args

    return config_from_args(args) is not None


if __name__ == "__main__":
    with exit_on_user_error():
        main()
