"""launch/setup.sh with stand-in interpreters: which one it takes, and when it does nothing.

A stand-in is a shell script that answers as Python would to the few questions set-up asks. PATH
holds nothing but stand-ins and the tools set-up needs, so the machine's own Pythons stay hidden.
"""

import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import ROOT

TOOLS = "bash cat cp df dirname env find flock head mkdir mv rm sha256sum sleep sort tail tr"

STAND_IN = r"""#!/usr/bin/env bash
version=@VERSION@ ensurepip=@ENSUREPIP@
case "$*" in
    -V) echo "Python $version.7" ;;
    "-c "*version_info*) [[ $version == "${@: -1}" ]] && echo "@SELF@" ;;
    "-c import ensurepip"*) exit $ensurepip ;;
    "-m venv "*)
        echo "venv $version $*" >>"$CALLS"
        [[ $ensurepip == 0 || $* == *--without-pip* ]] || exit 1
        mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    "-m pip install "*) echo "pip $PWD $*" >>"$CALLS"; sleep "${PIP_SECONDS:-0}"
        exit "${PIP_STATUS:-0}" ;;
    "-m pip --version") ;;
    *fetch_pip.py) echo fetch_pip >>"$CALLS"; exit "${FETCH_STATUS:-0}" ;;
    *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""

UV = r"""#!/usr/bin/env bash
echo "uv $*" >>"$CALLS"
mkdir -p "${@: -1}/bin" && cp "@PYTHON@" "${@: -1}/bin/python"
"""

BROKEN_SHIM = """#!/usr/bin/env bash
echo "pyenv: version 3.12 is not installed" >&2; exit 127
"""


@dataclass
class Machine:
    """A checkout and a PATH of our making."""

    folder: Path
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    @property
    def calls(self) -> list[str]:
        """What set-up made the stand-ins do, one line each."""
        log = self.folder / "calls"
        return log.read_text().splitlines() if log.exists() else []

    def script(self, path: str, body: str) -> Path:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(body)
        file.chmod(0o755)
        return file

    def python(self, path: str, version: str = "3.12", ensurepip: bool = True) -> Path:
        body = STAND_IN.replace("@VERSION@", version).replace(
            "@ENSUREPIP@", str(int(not ensurepip))
        )
        return self.script(path, body.replace("@SELF@", str(self.folder / path)))

    def environment(self, **extra: str) -> dict[str, str]:
        return {
            "PATH": f"{self.folder}/bin:{self.folder}/tools",
            "HOME": f"{self.folder}/home",
            "CALLS": f"{self.folder}/calls",
            **extra,
        }

    def setup(self, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.checkout / "launch" / "setup.sh")],
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "tools").mkdir()
    for tool in TOOLS.split():
        found = shutil.which(tool)
        assert found, f"{tool} is needed by this test"
        (tmp_path / "tools" / tool).symlink_to(found)
    (made.checkout / "launch").mkdir(parents=True)
    for name in ("setup.sh", "settings.sh", "find_python.sh", "fetch_pip.py"):
        shutil.copy(ROOT / "launch" / name, made.checkout / "launch" / name)
    (made.checkout / "requirements.txt").write_text("torch==1\n")
    (made.checkout / "pyproject.toml").write_text("[project]\n")
    return made


def test_makes_the_environment_once(machine: Machine) -> None:
    python = machine.python("bin/python3.12")
    first = machine.setup()
    assert first.returncode == 0, first.stderr
    assert f"Making .venv with {python}" in first.stdout
    assert "3 to 10 minutes" in first.stdout
    assert [call.split()[0] for call in machine.calls] == ["venv", "pip"]
    assert machine.calls[1] == (
        f"pip {machine.checkout} -m pip install --requirement requirements.txt --editable .[dev]"
    )
    started = time.monotonic()
    second = machine.setup()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert time.monotonic() - started < 1
    assert len(machine.calls) == 2


@pytest.mark.parametrize("changed", ["requirements.txt", "pyproject.toml"])
def test_changed_pins_are_installed_into_the_same_environment(
    machine: Machine, changed: str
) -> None:
    machine.python("bin/python3.12")
    machine.setup()
    (machine.checkout / changed).write_text("changed\n")
    machine.setup()
    machine.setup()
    assert [call.split()[0] for call in machine.calls] == ["venv", "pip", "pip"]


def test_changed_python_is_noticed(machine: Machine) -> None:
    machine.python("bin/python3.12")
    machine.setup()
    inside = machine.checkout / ".venv" / "bin" / "python"
    inside.write_text(inside.read_text().replace("$version.7", "$version.8"))
    machine.setup()
    assert [call.split()[0] for call in machine.calls] == ["venv", "pip", "pip"]


def test_environment_of_another_folder_or_a_vanished_python_is_made_anew(machine: Machine) -> None:
    machine.python("bin/python3.12")
    machine.setup()
    stamp = machine.checkout / ".venv" / ".made-from"
    stamp.write_text(stamp.read_text().replace(str(machine.checkout), "/another/folder"))
    machine.setup()
    assert [call.split()[0] for call in machine.calls] == ["venv", "pip"] * 2
    (machine.checkout / ".venv" / "bin" / "python").unlink()
    machine.setup()
    assert [call.split()[0] for call in machine.calls] == ["venv", "pip"] * 3


def test_a_link_to_the_environment_of_another_folder_is_left_alone(machine: Machine) -> None:
    machine.python("bin/python3.12")
    machine.setup()
    venv, elsewhere = machine.checkout / ".venv", machine.folder / "elsewhere"
    venv.rename(elsewhere)
    stamp = elsewhere / ".made-from"
    stamp.write_text(stamp.read_text().replace(str(machine.checkout), "/another/folder"))
    venv.symlink_to(elsewhere)
    refused = machine.setup()
    assert refused.returncode == 1
    assert "a link to the environment of /another/folder" in refused.stderr
    assert (elsewhere / "bin" / "python").exists()
    assert [call.split()[0] for call in machine.calls] == ["venv", "pip"]


@pytest.mark.parametrize("kind", ["data", "an environment of another Python", "a file"])
def test_what_it_did_not_make_is_left_alone_and_named(machine: Machine, kind: str) -> None:
    machine.python("bin/python3.12")
    venv = machine.checkout / ".venv"
    if kind == "a file":
        venv.write_text("mine")
    else:
        venv.mkdir()
        (venv / "mine").write_text("mine")
    if kind == "an environment of another Python":
        (venv / "pyvenv.cfg").write_text("version = 3.11.9\n")
        machine.python("checkout/.venv/bin/python", "3.11")
    before = sorted(machine.checkout.rglob("*"))
    refused = machine.setup()
    assert refused.returncode == 1
    assert f"error: {venv} is in the way" in refused.stderr
    assert machine.calls == []
    after = [path for path in machine.checkout.rglob("*") if path.name != ".venv.lock"]
    assert sorted(after) == before


def test_an_environment_that_was_cut_short_while_it_was_made_is_made_anew(machine: Machine) -> None:
    machine.python("bin/python3.12")
    machine.setup()
    left_over = machine.checkout / ".venv" / "half"
    for name in (".made-from", "bin/python"):
        (machine.checkout / ".venv" / name).unlink()
    (machine.checkout / ".venv.making").write_text("")
    left_over.write_text("")
    assert machine.setup().returncode == 0
    assert not (machine.checkout / ".venv.making").exists()
    assert [call.split()[0] for call in machine.calls] == ["venv", "pip"] * 2


def test_interrupted_installation_does_not_look_current(machine: Machine) -> None:
    machine.python("bin/python3.12")
    process = subprocess.Popen(
        ["bash", str(machine.checkout / "launch" / "setup.sh")],
        env=machine.environment(PIP_SECONDS="30"),
        stdout=subprocess.DEVNULL,
        process_group=0,
    )
    deadline = time.monotonic() + 30
    while len(machine.calls) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, 9)
    process.wait()
    assert machine.setup().returncode == 0
    assert [call.split()[0] for call in machine.calls] == ["venv", "pip"] * 2


def test_failed_installation_says_so_and_is_tried_again(machine: Machine) -> None:
    machine.python("bin/python3.12")
    failed = machine.setup(PIP_STATUS="1")
    assert failed.returncode == 1
    assert "error: pip could not install" in failed.stderr
    assert "PIP_INDEX_URL" in failed.stderr
    assert "ready" not in failed.stdout
    assert machine.setup().returncode == 0
    assert [call.split()[0] for call in machine.calls] == ["venv", "pip"] * 2


def test_two_calls_at_once_install_once(machine: Machine) -> None:
    machine.python("bin/python3.12")
    command = ["bash", str(machine.checkout / "launch" / "setup.sh")]
    environment = machine.environment(PIP_SECONDS="2")
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    output = "".join(process.communicate(timeout=60)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert [call.split()[0] for call in machine.calls] == ["venv", "pip"]
    assert output.count("Waiting for another set-up") == 1


@pytest.mark.parametrize("script", ["setup.sh", "serving/setup.sh", "benchmarks/setup_fbgemm.sh"])
def test_words_that_a_script_does_not_know_install_nothing(script: str, tmp_path: Path) -> None:
    """--dry-run made an environment of 6 GB."""
    elsewhere = {name: str(tmp_path / "made") for name in ("VLLM_ENV", "FBGEMM_ENV")}
    command, environment = ["bash", str(ROOT / "launch" / script)], {**os.environ, **elsewhere}
    for word, status, said in (("--dry-run", 2, "--dry-run was given"), ("--help", 0, script)):
        ended = subprocess.run(
            [*command, word], env=environment, capture_output=True, text=True, timeout=20
        )
        assert ended.returncode == status
        assert said in ended.stdout + ended.stderr
    assert not (tmp_path / "made").exists()


def taken(machine: Machine) -> str:
    result = machine.setup()
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("Making .venv"))
    return line.removeprefix(f"Making .venv with {machine.folder}/")


def test_pyenv_version_is_used_where_its_shim_does_not_work(machine: Machine) -> None:
    machine.script("bin/python3.12", BROKEN_SHIM)
    machine.script("bin/python3", BROKEN_SHIM)
    machine.python("home/.pyenv/versions/3.11.9/bin/python", "3.11")
    machine.python("home/.pyenv/versions/3.12.1/bin/python")
    machine.python("home/.pyenv/versions/3.12.10/bin/python")
    assert taken(machine) == "home/.pyenv/versions/3.12.10/bin/python"


def test_pyenv_kept_elsewhere_is_asked_for_its_folder(machine: Machine) -> None:
    machine.script("bin/pyenv", f"#!/usr/bin/env bash\necho {machine.folder}/opt/pyenv\n")
    machine.python("opt/pyenv/versions/3.12.4/bin/python")
    assert taken(machine) == "opt/pyenv/versions/3.12.4/bin/python"


def test_second_python_on_the_path_is_found_behind_an_older_one(machine: Machine) -> None:
    machine.python("bin/python3", "3.11")
    machine.python("tools/python3", "3.12")
    assert taken(machine) == "tools/python3"


def test_named_python_comes_first_and_must_fit(machine: Machine) -> None:
    machine.python("bin/python3.12")
    named = machine.python("mine/python")
    old = machine.python("mine/python3.9", "3.9")
    refused = machine.setup(PYTHON=str(old))
    assert refused.returncode == 1
    assert f"PYTHON={old} is not a working Python 3.12" in refused.stderr
    assert machine.calls == []
    assert f"Making .venv with {named}" in machine.setup(PYTHON=str(named)).stdout


def test_uv_is_used_where_there_is_no_python(machine: Machine) -> None:
    python = machine.python("hidden/python")
    machine.python("bin/python3", "3.13")
    machine.script("bin/uv", UV.replace("@PYTHON@", str(python)))
    assert machine.setup().returncode == 0
    assert machine.calls[0] == f"uv venv --seed --python 3.12 {machine.checkout}/.venv"
    assert machine.calls[1].startswith("pip ")


def test_nothing_found_names_every_way(machine: Machine) -> None:
    machine.python("bin/python3", "3.11")
    result = machine.setup()
    assert result.returncode == 1
    for way in ("apt-get install python3.12", "pyenv install 3.12", "uv python install", "PYTHON="):
        assert way in result.stderr
    assert machine.calls == []


def test_missing_ensurepip_is_made_up_for_from_the_package_index(machine: Machine) -> None:
    machine.python("bin/python3.12", ensurepip=False)
    assert machine.setup().returncode == 0
    assert [call.split()[0] for call in machine.calls] == ["venv", "fetch_pip", "pip"]
    assert "--without-pip" in machine.calls[0]


def test_missing_ensurepip_and_no_index_names_the_package(machine: Machine) -> None:
    machine.python("bin/python3.12", ensurepip=False)
    result = machine.setup(FETCH_STATUS="1")
    assert result.returncode == 1
    assert "sudo apt-get install python3.12-venv" in result.stderr
    assert machine.setup().returncode == 0  # what was left over does not stand in the way
