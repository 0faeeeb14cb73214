"""What a compression study finds, as numbers and as lines of a table."""

from dataclasses import dataclass

from recsys.studies.compression.config import CompressionStudyConfig
from recsys.studies.compression.jobs import WHOLE, Size, Variant
from recsys.studies.compression.speed import Speed
from recsys.studies.estimates import Estimate
from recsys.studies.findings import plain
from recsys.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Point:
    """One kind of embeddings at one size."""

    variant: Variant
    title: str
    size: Size
    compression: float
    """Reached: floats of whole tables over its own."""
    table_lr: float
    """Chosen by validation logloss."""
    test: dict[str, Estimate]
    """Over seeds."""
    against_whole: dict[str, Estimate]
    """Its metric minus that of whole tables of the same seed."""
    speed: Speed


@dataclass(frozen=True, kw_only=True)
class Results:
    """All numbers of a study."""

    study: CompressionStudyConfig
    recipe: TrainConfig
    dataset: str
    num_test_rows: int
    points: list[Point]
    left_out: dict[str, str]
    """Names of what cannot be on these data, and why."""

    @property
    def title(self) -> str:
        """Which runs they are of."""
        runs = f"{self.study.seeds} seeds of {self.study.backbone}"
        return f"{self.dataset}, {self.num_test_rows:,} test rows, {runs}"


def rows_of(results: Results) -> tuple[list[str], list[list[str]]]:
    """The main table: head and rows of plain text."""
    head = ["embeddings", "asked", "reached", "MB", "table lr", "AUC", "logloss", "AUC - whole", "step, ms"]
    head += ["rows/s", "lookup rows/s"]
    rows = []
    for point in results.points:
        whole = point.variant.kind == WHOLE
        rows.append(
            [
                point.title,
                "" if whole else f"{point.variant.compression:g}x",
                f"{point.compression:,.4g}x",
                f"{point.size.bytes / 1e6:,.3g}",
                f"{point.table_lr:g}",
                plain(point.test["auc"]),
                plain(point.test["logloss"]),
                "" if whole else plain(point.against_whole["auc"], sign=True),
                f"{point.speed.step_ms:,.2f}",
                f"{point.speed.rows_per_s:,.0f}",
                f"{point.speed.lookup_rows_per_s:,.0f}",
            ]
        )
    return head, rows
