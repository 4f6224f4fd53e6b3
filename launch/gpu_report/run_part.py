"""The process of one part: `python -m launch.gpu_report.run_part MODULE FILE [--large]`.

Each row is in FILE, a line of JSON, before the next is measured.
"""

import importlib
import json
import sys
from collections.abc import Sequence

from launch.gpu_report.row import attempted


def main(argv: Sequence[str]) -> None:
    """Run the part that MODULE is."""
    module, file, *flags = argv
    part = importlib.import_module(module)
    with open(file, "a", encoding="utf-8") as rows:
        for row in attempted(module.rpartition(".")[2], lambda: part.rows("--large" in flags)):
            print(json.dumps(row.columns()), file=rows, flush=True)
            print(f"  {row.what}: {row.error or row.value} {row.unit}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
