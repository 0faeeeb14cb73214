"""The config of `recsys report`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which runs to report on."""

    runs: Positional[tuple[Path, ...]]
    """Run folders; they may still be written to."""
    out: Path | None = None
    """HTML file to write; without it report.html in the run folder, where there is one."""
