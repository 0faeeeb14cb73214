"""What `recsys doctor` reports: whether this environment can train, and the one line that mends what is wrong with it.

Imports the standard library alone. torch is loaded in a process of its own, so that a crash or a hang is a finding.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# (torch, torchrec, fbgemm) whose binaries fit one another -> the CUDA major version that they need, if only one.
TRIOS: dict[tuple[str, str, str], str | None] = {
    ("2.13.0", "1.8.0", "1.8.0"): None,
    ("2.11.0", "1.6.1", "1.6.0"): "13",
}

LOAD_TIMEOUT_SECONDS = 120

# fbgemm_gpu logs a library that does not load and goes on: only calling an operator tells.
_LOAD = """
import json
import torch, torchrec, fbgemm_gpu
from recsys.native import available, instructions
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
for device in ["cpu", *(["cuda"] if gpus else [])]:
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2, 3], device=device))
    assert offsets.tolist() == [0, 1, 3, 6], offsets
native = available("tables") and available("fused") and instructions()
print(json.dumps({"cuda": torch.version.cuda, "gpus": gpus, "native": native}))
"""


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: what was looked at, one word.
        ok: whether training can rely on it.
        found: what is there, for people.
        remedy: the shell line that mends it; empty when `ok`.
    """

    name: str
    ok: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class _Loaded:
    """What the process that loaded the trio said: its error, or torch's CUDA version, its GPUs, our operators."""

    error: str = ""
    cuda: str | None = None
    gpus: tuple[str, ...] = ()
    native: str | bool = False
    """Instruction set of the operators."""


def diagnose() -> list[Check]:
    """Look at everything that training needs, in the order in which to mend it. Takes seconds: it loads torch once."""
    accelerator = "cuda" if shutil.which("nvidia-smi") else "cpu"
    fbgemm = "fbgemm-gpu" if accelerator == "cuda" else "fbgemm-gpu-cpu"
    install_trio = (
        "pip uninstall --yes fbgemm-gpu fbgemm-gpu-cpu; "
        f"pip install torch==2.13.0 {fbgemm}==1.8.0 && pip install --no-deps torchrec==1.8.0"
    )
    rebuild = f"make clean setup ACCELERATOR={accelerator}"
    loaded = _load_trio()
    trio = _check_trio(loaded, install_trio)
    return [
        _check_python(),
        _check_installed("torch", install_trio),
        _check_installed("torchrec", install_trio),
        _check_fbgemm(install_trio),
        trio,
        _check_load(loaded, rebuild if trio.ok else install_trio),
        # Training works without, so this is no fault.
        Check(
            "native",
            True,
            f"operators in C++, {loaded.native}" if loaded.native else "none: slower training on a CPU",
        ),
        _check_device(loaded, accelerator, rebuild),
        Check("cores", True, str(len(os.sched_getaffinity(0)))),
        _check_installed("torchx", "pip install torchx==0.7.0"),
        _check_torchrun(install_trio),
        _check_installed("polars", 'pip install "polars>=2.1"'),
        _check_installed("pyarrow", 'pip install "pyarrow>=20"'),
    ]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _fbgemm_builds() -> dict[str, str]:
    versions = {build: _version(build) for build in ("fbgemm-gpu", "fbgemm-gpu-cpu")}
    return {build: version for build, version in versions.items() if version is not None}


def _load_trio() -> _Loaded:
    command = [sys.executable, "-P", "-c", _LOAD]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return _Loaded(error=f"no answer in {LOAD_TIMEOUT_SECONDS} s")
    if done.returncode < 0:
        return _Loaded(error=f"killed by {signal.Signals(-done.returncode).name}")
    if done.returncode > 0:
        return _Loaded(error=(done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
    answer = json.loads(done.stdout.splitlines()[-1])
    return _Loaded(cuda=answer["cuda"], gpus=tuple(answer["gpus"]), native=answer["native"])


def _check_python() -> Check:
    version = platform.python_version()
    ok = tuple(map(int, version.split(".")[:2])) >= (3, 11)
    return Check("python", ok, version, "" if ok else "make clean setup PYTHON=python3.11")


def _check_installed(distribution: str, remedy: str) -> Check:
    version = _version(distribution)
    if version is None:
        return Check(distribution, False, "not installed", remedy)
    return Check(distribution, True, version)


def _check_fbgemm(remedy: str) -> Check:
    builds = _fbgemm_builds()
    found = " and ".join(f"{build} {version}" for build, version in builds.items())
    if len(builds) == 1:
        return Check("fbgemm", True, found)
    if builds:
        return Check("fbgemm", False, f"{found}: each overwrites the files of the other", remedy)
    return Check("fbgemm", False, "not installed", remedy)


def _check_trio(loaded: _Loaded, remedy: str) -> Check:
    fbgemm = next(iter(_fbgemm_builds().values()), None)
    versions = {"torch": _version("torch"), "torchrec": _version("torchrec"), "fbgemm": fbgemm}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return Check("trio", False, f"incomplete: no {', '.join(missing)}", remedy)
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    torch, torchrec, fbgemm = (str(version).partition("+")[0] for version in versions.values())
    if (torch, torchrec, fbgemm) not in TRIOS:
        return Check("trio", False, f"{found}: not built for one another", remedy)
    cuda = TRIOS[torch, torchrec, fbgemm]
    if cuda is not None and not loaded.error and (loaded.cuda or "none").partition(".")[0] != cuda:
        return Check("trio", False, f"{found}: needs CUDA {cuda}, torch has {loaded.cuda or 'none'}", remedy)
    return Check("trio", True, found)


def _check_load(loaded: _Loaded, remedy: str) -> Check:
    if loaded.error:
        return Check("load", False, f"torch, torchrec and fbgemm do not load together: {loaded.error}", remedy)
    return Check("load", True, "torch, torchrec and fbgemm load together")


def _check_device(loaded: _Loaded, accelerator: str, remedy: str) -> Check:
    if loaded.error:
        return Check("device", False, "unknown: torch, torchrec and fbgemm do not load", remedy)
    if loaded.gpus:
        return Check("device", True, f"{len(loaded.gpus)} x {loaded.gpus[0]}, CUDA {loaded.cuda}")
    if accelerator == "cuda":
        return Check("device", False, f"cpu: torch (CUDA {loaded.cuda or 'none'}) sees no GPU, nvidia-smi does", remedy)
    return Check("device", True, "cpu")


def _check_torchrun(install: str) -> Check:
    """Torchx starts `torchrun` by name: the first on PATH must be this environment's."""
    found = shutil.which("torchrun")
    beside = Path(sysconfig.get_path("scripts"), "torchrun")
    if found is not None and (Path(found) == beside or not beside.exists()):
        return Check("torchrun", True, found)
    remedy = f'export PATH="{beside.parent}:$PATH"' if beside.exists() else install
    return Check("torchrun", False, f"{found}: of another environment" if found else "not on PATH", remedy)
