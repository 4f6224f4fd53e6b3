"""All patches, applied and reverted together.

To add one: write `patches/<name>.py` ending in `PATCH = Patch(...)`, add <name> to PATCH_MODULES.
"""

import importlib
import logging
import os
from collections.abc import Collection
from importlib.metadata import version as installed_version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ultramem_megatron.patches.patch import SUPPORTED_MEGATRON, Editor, Patch, PatchError

PATCH_MODULES = (
    # A machine without CUDA.
    "cpu.devices",
    "cpu.cuda_calls",
    "cpu.device_mesh",
    "cpu.initialize",
    "cpu.rng_state",
    "cpu.no_compile",
    "cpu.dynamic_batching",
    "cpu.context_parallel_attention",
    "cpu.expert_exchange",
    "cpu.torch_norms",
    "cpu.latent_attention",
    "cpu.mamba_scan",
    "cpu.mamba_decoding",
    "cpu.grouped_experts",
    "cpu.shared_storage",
    "cpu.loaded_shards",
    "cpu.background_saves",
    "cpu.uneven_gather",
    # Every machine, where the defect exists.
    "cpu.jit_warmup",
    "cpu.paged_attention",
    "defects.dataset_helpers",
    "defects.dataset_cache",
    "defects.help_text",
    "defects.first_log_line",
    "defects.recompute_without_engine",
    "defects.latent_positions",
    "defects.mamba_static_batch",
    "defects.later_tokens_over_context",
    # What memory layers need.
    "doors.optimizer_config",
    "doors.optimizer_built",
    "doors.training_log",
    "doors.flops",
    "doors.footprint",
    "doors.common_keys",
    "doors.fsdp2_units",
    "doors.megatron_fsdp_parts",
    "doors.fsdp_dtensor_state",
    "defects.megatron_fsdp_lone_parts",
    "defects.megatron_fsdp_empty_shards",
    "defects.megatron_fsdp_gated_names",
    "defects.megatron_fsdp_loss_scale",
    "defects.megatron_fsdp_params_norm",
    "defects.megatron_fsdp_cut_rows",
    "doors.gradient_streams",
    "defects.fsdp2_token_loss",
    "defects.fsdp2_checkpoints",
    "defects.distopt_initial_state",
    "defects.distopt_missing_step",
    "defects.distopt_shared_step",
    "defects.distopt_empty_shard",
    "defects.distopt_load_without_grad",
    "defects.adam_first_steps",
    "defects.fused_adam",
    "defects.loss_scale_together",
    "defects.empty_groups",
    "defects.stub_optimizers",
    # Faults.
    "defects.checkpoint_sums",
    "defects.tensor_strides",
    "defects.safe_metadata",
    "defects.safe_objects",
    "defects.stored_code",
    "defects.results_queue",
    "defects.whole_iterations",
    "defects.events_folder",
)
"""Order of application; every name is a file in this folder."""

OVERRIDE = "ULTRAMEM_ALLOW_UNTESTED_MEGATRON"

logger = logging.getLogger(__name__)
_applied: dict[str, Editor] = {}


def all_patches() -> tuple[Patch, ...]:
    """Every patch we have, active here or not, in order of application."""
    return tuple(
        importlib.import_module(f"ultramem_megatron.patches.{name}").PATCH for name in PATCH_MODULES
    )


def is_applied(name: str) -> bool:
    """Whether the patch of this name is in force in this process."""
    return name in _applied


def fits(patch: Patch) -> bool:
    """Whether the installed megatron-core is one of those that the patch names."""
    return SpecifierSet(patch.versions).contains(installed_version("megatron-core"), True)


def applied() -> tuple[str, ...]:
    """Names of the patches in force in this process, in order of application."""
    return tuple(_applied)


def apply_all(only: Collection[str] | None = None) -> tuple[str, ...]:
    """Apply every patch that this machine needs; a patch already in force is left alone.

    Args:
        only: names to choose from; None means all. (The tests compare runs with few and many.)

    Returns:
        Names of all patches in force afterwards.

    Raises:
        PatchError: unknown name in `only`, unsupported Megatron, or an upstream symbol that is
            not the one a patch was written for. Then nothing stays half applied.
    """
    patches = all_patches()
    unknown = set(only or ()) - {patch.name for patch in patches}
    if unknown:
        raise PatchError(f"unknown patches {sorted(unknown)}; known: {[p.name for p in patches]}.")
    wanted = [p for p in patches if (only is None or p.name in only) and not is_applied(p.name)]
    check_version()
    needed = [p for p in wanted if p.active() and fits(p)]
    for patch in needed:
        _apply(patch)
    if needed and os.environ.get("RANK", "0") == "0":
        print(f"ultramem_megatron: patches applied: {', '.join(_applied)}", flush=True)
    return applied()


def revert_all() -> None:
    """Undo every patch in force, last first; afterwards upstream is as it was imported."""
    for name in reversed(list(_applied)):
        _applied.pop(name).revert()


def check_version() -> Version:
    """The installed megatron-core's, if it is a supported one.

    Raises:
        PatchError: names the version found, the ones supported and the environment variable
            that lets the run go on regardless.
    """
    found = Version(installed_version("megatron-core"))
    if SpecifierSet(SUPPORTED_MEGATRON).contains(found, prereleases=True):
        return found
    message = (
        f"megatron-core {found} is installed, {SUPPORTED_MEGATRON} is supported. Install such a one"
    )
    if os.environ.get(OVERRIDE) != "1":
        raise PatchError(f"{message}, or set {OVERRIDE}=1 to try this one at your own risk.")
    logger.warning("%s; going on because %s=1.", message, OVERRIDE)
    return found


def _apply(patch: Patch) -> None:
    editor = Editor(patch.name)
    try:
        patch.install(editor)
    except BaseException:
        editor.revert()
        raise
    _applied[patch.name] = editor
