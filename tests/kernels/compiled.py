"""Machine code of Triton kernels for GPUs that are not here, and what can be read off it.

Nothing is run and no driver is needed: Triton compiles to PTX, its own ptxas to machine code.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Compiled:
    """registers: per thread. spilled: bytes per thread, stores and loads."""

    ptx: str
    registers: int
    spilled: int


def compile_for(
    capability: int,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    any_number: Mapping[str, str] = MappingProxyType({}),
) -> Compiled:
    """Compile `kernel` for compute capability 80, 90 or 100.

    types: Triton's name of each argument's type ("*bf16", "i32"), all divisible by 16, as whole
    tensors and sizes of real models are. any_number: those of arguments of which nothing is known.
    constants: the constexpr arguments, num_warps, and enable_fp_fusion where it is given.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: {**types, **any_number}.get(name, "constexpr") for name in names}
    values = {(names.index(k),): v for k, v in constants.items() if k in names}
    attributes = {(names.index(k),): [["tt.divisibility", 16]] for k in types}
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": constants.get("num_warps", 4)}
    if "enable_fp_fusion" in constants:
        options["enable_fp_fusion"] = constants["enable_fp_fusion"]
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _assembled(built.asm["ptx"], capability)


def _assembled(ptx: str, capability: int) -> Compiled:
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = re.search(r"\.target (\w+)", ptx)
    assert architecture, ptx[:500]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"-arch={architecture[1]}", str(path)]
        command += ["--regAllocOptLevel=2", "-o", str(path.with_suffix(".cubin"))]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    log = run.stdout + run.stderr
    assert run.returncode == 0, log
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    found = re.search(r"Used (\d+) registers", log)
    assert found, log
    return Compiled(ptx, int(found[1]), spilled)
