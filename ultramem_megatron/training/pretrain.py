"""Pre-train a GPT with memory layers by Megatron's own `pretrain()`.

    torchrun ... -m ultramem_megatron train <Megatron's flags> --ultramem-spans 3:5/6:8 ...

Without --ultramem flags it is a plain GPT. Without torchrun (`python -m ...`) it is a run of one
process.
"""

import sys
from collections.abc import Callable, Collection, Sequence

from ultramem_megatron.errors import exit_on_user_error
from ultramem_megatron.megatron.flags.process import open_process


def main(
    argv: Sequence[str] | None = None,
    patches: Collection[str] | None = None,
    before_training: Callable[[], None] | None = None,
) -> None:
    """Parse Megatron's command line, build the model configuration and train.

    Args:
        argv: flags; None takes them from the command line.
        patches: names of the patches to apply; None applies all that this machine needs.
        before_training: called when all is checked, just before Megatron takes over.

    Raises UltraMemError for a wrong flag, size or combination, before anything is built.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    open_process(given, patches=patches)

    # Imported here, as Megatron takes seconds to import and the patches come first.
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from ultramem_megatron.data.check import check_data
    from ultramem_megatron.faults.machine_errors import explained
    from ultramem_megatron.faults.run_lock import only_run
    from ultramem_megatron.megatron.checkpoint.source import named_where_not_finite
    from ultramem_megatron.megatron.flags.arguments import add_ultramem_arguments
    from ultramem_megatron.megatron.flags.embedding_ranks import get_embedding_ranks
    from ultramem_megatron.megatron.flags.late_arguments import LateArguments
    from ultramem_megatron.megatron.flags.refusals import refuse_other_tasks
    from ultramem_megatron.megatron.flags.refused_by_megatron import megatron_refuses
    from ultramem_megatron.megatron.in_force import log_settings
    from ultramem_megatron.megatron.model_from_flags import model_config_from_args
    from ultramem_megatron.training.gpt_datasets import train_valid_test_datasets_provider
    from ultramem_megatron.training.gpt_step import forward_step

    arguments = LateArguments()
    with megatron_refuses(), arguments.held():
        args = parse_and_validate_args(extra_args_provider=add_ultramem_arguments)
    refuse_other_tasks(args)
    with only_run(None if args.skip_train else args.save):
        check_data(args)
        model_config = model_config_from_args(args, get_embedding_ranks)
        arguments.show()
        log_settings(args, model_config)
        if before_training is not None:
            before_training()
        with explained(args, given), named_where_not_finite(args):
            pretrain(
                pretrain_cfg_container_from_args(args, model_config),
                train_valid_test_datasets_provider,
                ModelType.encoder_or_decoder,
                forward_step,
                get_embedding_ranks=get_embedding_ranks,
            )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
