import json
import signal
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from recsys import doctor

VERSIONS = {
    "torch": "2.13.0+cpu",
    "torchrec": "1.8.0",
    "fbgemm-gpu-cpu": "1.8.0",
    "torchx": "0.7.0",
    "polars": "2.1.0",
    "pyarrow": "26.0.1",
}
NAMES = ["python", "torch", "torchrec", "fbgemm", "trio", "load", "native", "device", "cores", "torchx", "torchrun"]
NAMES += ["polars", "pyarrow"]


class Machine:
    """A made-up machine, healthy unless a test says otherwise."""

    def __init__(self, scripts: Path) -> None:
        self.python = "3.11.7"
        self.versions = dict(VERSIONS)
        self.scripts = scripts
        self.programs = {"torchrun": str(scripts / "torchrun")}
        self.returncode = 0
        self.stdout = json.dumps({"cuda": None, "gpus": [], "native": "avx2"})
        self.stderr = ""
        self.hangs = False

    def version(self, distribution: str) -> str:
        if distribution not in self.versions:
            raise metadata.PackageNotFoundError(distribution)
        return self.versions[distribution]

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if self.hangs:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, self.returncode, self.stdout, self.stderr)

    def has_gpu(self, cuda: str | None, gpus: tuple[str, ...] = ("NVIDIA H100",)) -> None:
        self.programs["nvidia-smi"] = "/usr/bin/nvidia-smi"
        self.stdout = json.dumps({"cuda": cuda, "gpus": list(gpus), "native": "avx2"})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    (tmp_path / "torchrun").touch()
    machine = Machine(tmp_path)
    monkeypatch.setattr("platform.python_version", lambda: machine.python)
    monkeypatch.setattr("importlib.metadata.version", machine.version)
    monkeypatch.setattr("subprocess.run", machine.run)
    monkeypatch.setattr("shutil.which", machine.programs.get)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(machine.scripts))
    return machine


def failures() -> dict[str, doctor.Check]:
    checks = doctor.diagnose()
    assert [check.name for check in checks] == NAMES
    for check in checks:
        assert check.found
        assert "\n" not in check.found + check.remedy
        assert check.ok == (check.remedy == "")
    return {check.name: check for check in checks if not check.ok}


INSTALL_CPU = (
    "pip uninstall --yes fbgemm-gpu fbgemm-gpu-cpu; "
    "pip install torch==2.13.0 fbgemm-gpu-cpu==1.8.0 && pip install --no-deps torchrec==1.8.0"
)


def test_this_environment_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", sysconfig.get_path("scripts"), prepend=":")
    assert failures() == {}


def test_torchrun_off_the_path_of_this_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_load_trio", doctor._Loaded)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert failures()["torchrun"].remedy == f'export PATH="{sysconfig.get_path("scripts")}:$PATH"'


def test_a_healthy_machine(machine: Machine) -> None:
    assert failures() == {}


def test_a_healthy_gpu_machine(machine: Machine) -> None:
    machine.has_gpu("12.8")
    machine.versions["fbgemm-gpu"] = machine.versions.pop("fbgemm-gpu-cpu")
    assert failures() == {}
    device = next(check for check in doctor.diagnose() if check.name == "device")
    assert device.found == "1 x NVIDIA H100, CUDA 12.8"


def test_the_older_trio_needs_cuda_13(machine: Machine) -> None:
    del machine.versions["fbgemm-gpu-cpu"]
    machine.versions |= {"torch": "2.11.0", "torchrec": "1.6.1", "fbgemm-gpu": "1.6.0"}
    machine.has_gpu("13.0")
    assert failures() == {}
    machine.has_gpu("12.8")
    found = failures()
    assert list(found) == ["trio"]
    assert "needs CUDA 13, torch has 12.8" in found["trio"].found


def test_old_python(machine: Machine) -> None:
    machine.python = "3.10.13"
    found = failures()
    assert list(found) == ["python"]
    assert found["python"].remedy == "make clean setup PYTHON=python3.11"


@pytest.mark.parametrize("name", ["torch", "torchrec", "fbgemm-gpu-cpu"])
def test_one_of_the_trio_is_missing(machine: Machine, name: str) -> None:
    del machine.versions[name]
    machine.returncode, machine.stderr = 1, f"Traceback\nModuleNotFoundError: No module named '{name}'\n"
    found = failures()
    assert list(found) == [name.removesuffix("-gpu-cpu"), "trio", "load", "device"]
    assert {check.remedy for check in found.values()} == {INSTALL_CPU, "make clean setup ACCELERATOR=cpu"}
    assert found["load"].remedy == found["trio"].remedy == INSTALL_CPU
    assert found["load"].found.endswith(f": ModuleNotFoundError: No module named '{name}'")


@pytest.mark.parametrize(("name", "remedy"), [("torchx", "torchx==0.7.0"), ("polars", '"polars>=2.1"')])
def test_a_package_is_missing(machine: Machine, name: str, remedy: str) -> None:
    del machine.versions[name]
    found = failures()
    assert list(found) == [name]
    assert found[name].remedy == f"pip install {remedy}"


def test_versions_that_do_not_fit(machine: Machine) -> None:
    machine.versions["torch"] = "2.15.0"
    found = failures()
    assert list(found) == ["trio"]
    assert found["trio"].found == "torch 2.15.0, torchrec 1.8.0, fbgemm 1.8.0: not built for one another"
    assert found["trio"].remedy == INSTALL_CPU


def test_both_builds_of_fbgemm(machine: Machine) -> None:
    machine.versions["fbgemm-gpu"] = "1.8.0"
    found = failures()
    assert list(found) == ["fbgemm"]
    assert "fbgemm-gpu 1.8.0 and fbgemm-gpu-cpu 1.8.0" in found["fbgemm"].found
    assert found["fbgemm"].remedy == INSTALL_CPU


@pytest.mark.parametrize(
    ("returncode", "stderr", "hangs", "said"),
    [
        (-signal.SIGSEGV, "", False, "killed by SIGSEGV"),
        (1, "Traceback\nOSError: undefined symbol: x\n", False, "OSError: undefined symbol: x"),
        (3, "", False, "exit status 3"),
        (0, "", True, f"no answer in {doctor.LOAD_TIMEOUT_SECONDS} s"),
    ],
)
def test_the_trio_does_not_load(machine: Machine, returncode: int, stderr: str, hangs: bool, said: str) -> None:
    machine.returncode, machine.stderr, machine.hangs = returncode, stderr, hangs
    found = failures()
    assert list(found) == ["load", "device"]
    assert found["load"].found.endswith(f": {said}")
    assert {check.remedy for check in found.values()} == {"make clean setup ACCELERATOR=cpu"}


def test_a_gpu_that_torch_does_not_see(machine: Machine) -> None:
    machine.has_gpu(None, gpus=())
    found = failures()
    assert list(found) == ["device"]
    assert found["device"].remedy == "make clean setup ACCELERATOR=cuda"


def test_torchrun_of_another_environment(machine: Machine) -> None:
    machine.programs["torchrun"] = "/usr/bin/torchrun"
    found = failures()
    assert list(found) == ["torchrun"]
    assert found["torchrun"].remedy == f'export PATH="{machine.scripts}:$PATH"'


def test_torchrun_nowhere(machine: Machine) -> None:
    del machine.programs["torchrun"]
    (machine.scripts / "torchrun").unlink()
    assert failures()["torchrun"].remedy == INSTALL_CPU


def test_torchrun_installed_outside_the_environment(machine: Machine) -> None:
    machine.programs["torchrun"] = "/home/me/.local/bin/torchrun"
    (machine.scripts / "torchrun").unlink()
    assert failures() == {}


def test_a_crash_of_the_loading_process_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LOAD", "import os; os.abort()")
    assert doctor._load_trio().error == "killed by SIGABRT"


def test_importing_the_doctor_loads_nothing_heavy() -> None:
    code = "import sys, recsys.doctor; print([name for name in ('torch', 'polars', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_advice_agrees_with_the_requirements() -> None:
    requirements = Path(__file__).parent.parent / "requirements"
    pinned = {line for file in requirements.glob("*.txt") for line in file.read_text().splitlines()}
    assert {"torch==2.13.0", "fbgemm-gpu-cpu==1.8.0", "fbgemm-gpu==1.8.0", "torchrec==1.8.0", "torchx==0.7.0"} <= pinned
    assert ("2.13.0", "1.8.0", "1.8.0") in doctor.TRIOS
