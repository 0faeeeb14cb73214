"""What every result of a benchmark carries: where it comes from, and what made it."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]


def facts(script: str, packages: Sequence[str], load: tuple[float, float, float]) -> dict[str, Any]:
    """Commit, machine, versions, command and date of a run of a `script`, which found the machine under `load`."""
    return {
        "commit": output("git", "describe", "--always", "--dirty", "--exclude", "*"),
        "machine": _machine() | {"load_at_start": load},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def output(*command: str) -> str:
    """Run a command from the repository; returns what it says."""
    return subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory": psutil.virtual_memory().total}
