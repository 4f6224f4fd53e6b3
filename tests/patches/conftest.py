"""Patches are tested on upstream as it is, whatever tests before have applied in this process."""

from collections.abc import Iterator

import pytest

from ultramem_megatron.patches import registry


@pytest.fixture(autouse=True)
def as_imported() -> Iterator[None]:
    """No patch in force; those that were are applied again afterwards."""
    before = [patch.name for patch in registry.all_patches() if registry.is_applied(patch.name)]
    registry.revert_all()
    yield
    if before:
        registry.apply_all(before)
