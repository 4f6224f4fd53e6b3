"""Megatron's check of a checkpoint's sums is ours: threads, once for each start, user errors."""

from pathlib import Path

from ultramem_megatron.patches.patch import Editor, Patch

_FUNCTION = "megatron.core.dist_checkpointing.validation._verify_integrity_manifest_impl"


def _verify(checkpoint_dir: str) -> None:
    from megatron.core.dist_checkpointing.core import CheckpointingException

    from ultramem_megatron.faults.integrity import DamagedCheckpointError, verify

    try:
        verify(Path(checkpoint_dir))
    except DamagedCheckpointError as error:
        raise CheckpointingException(str(error)) from None


def _install(editor: Editor) -> None:
    editor.replace(_FUNCTION, _verify, ("checkpoint_dir",))


PATCH = Patch(
    name="defects.checkpoint_sums",
    symbols=(_FUNCTION,),
    reason="Upstream checks after it has read parts of the files, and hashes on one thread; "
    "ultramem_megatron.faults.integrity checks first, and all would be hashed twice.",
    delete_when="load() checks before reading, on several threads, and remembers.",
    install=_install,
)
