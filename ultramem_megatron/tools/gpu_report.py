"""Run the report of launch/gpu_report: it stands in a checkout, not in the wheel."""

import sys
from collections.abc import Sequence

from ultramem_megatron.tools.bench import become


def main(argv: Sequence[str] | None = None) -> None:
    """Become the report's own process. Raises UltraMemError without a checkout."""
    become("gpu_report", sys.argv[1:] if argv is None else argv)
