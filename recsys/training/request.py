"""What `recsys predict` is asked for. It imports no torch, so that help is instant."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from recsys.embeddings.config import served_dtype
from recsys.place import Place

_BUDGET = re.compile(r"(?P<time>\d+(?:\.\d+)?)(?P<unit>us|ms|s)")
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What to predict, by whom, in which time."""

    run: Positional[Path]
    """Run folder."""
    out: Path
    """Parquet file to write: row, label, weight, a logit a member, and the merged logit."""
    split: Literal["valid", "test"] = "test"
    """Held-out split."""
    data: Place | None = None
    """Prepared folder, may be a URL; without it, the one that the run was trained on."""
    members: tuple[str, ...] = ()
    """Members to ask, by name; or one number alone, for the best so many by greedy selection on validation rows."""
    budget: str | None = None
    """Time for a batch, such as 3ms: members are asked one after another while it lasts."""
    batch_size: int | None = None
    """Rows of a batch; that of training when not given."""
    tables: str | None = None
    """Quantise tables row by row before predicting: fp32, fp16, int8, int4 or int2."""

    def __post_init__(self) -> None:
        if self.tables is not None:
            served_dtype(self.tables)
        if self.budget is not None and not (_BUDGET.fullmatch(self.budget) and self.budget_ms > 0):
            raise ValueError(f"budget {self.budget!r} is no time above 0; write 3ms, 500us or 1s")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} must be at least 1")

    @property
    def budget_ms(self) -> float:
        """The budget in milliseconds."""
        match = _BUDGET.fullmatch(self.budget or "")
        assert match
        return float(match["time"]) * _MILLISECONDS[match["unit"]]
