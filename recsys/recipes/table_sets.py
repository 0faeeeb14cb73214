"""Table sets to plan for without any data: those of public benchmarks, and large ones made up."""

from collections.abc import Callable

import numpy as np

from recsys.data.schema import Schema
from recsys.recipes.mlperf import mlperf_schema
from recsys.sharding.workload import TableSpec, Workload

NUM_TABLES = 10_000


def synthetic_10k() -> Workload:
    """10,000 tables as large companies have them: a few are huge, most are small, some look up hundreds of ids a row.

    Rows are log-normal (median 20,000, up to a billion), dimensions 16 to 256, pooling factors log-normal around 5.
    """
    rng = np.random.default_rng(0)
    rows = np.clip(np.exp(rng.normal(np.log(2e4), 2.4, NUM_TABLES)), 10, 1e9).astype(np.int64)
    dims = rng.choice([16, 32, 64, 128, 256], NUM_TABLES, p=[0.2, 0.2, 0.3, 0.25, 0.05])
    pooling = np.clip(np.exp(rng.normal(np.log(5), 1.2, NUM_TABLES)), 1, 500).round(1)
    return Workload(
        name="synthetic_10k",
        tables=tuple(
            TableSpec(
                name=f"table_{index:05d}", rows=int(rows[index]), dim=int(dims[index]), pooling=float(pooling[index])
            )
            for index in range(NUM_TABLES)
        ),
        batch_size=1_048_576,
        dense_parameters=1_000_000_000,
        dense_flops=4_000_000_000,
        dense_precision="bf16",
        dense_activations=200_000,
    )


WORKLOADS: dict[str, Callable[[], Workload]] = {"synthetic_10k": synthetic_10k}
"""For `recsys plan` alone."""
SCHEMAS: dict[str, Callable[[], Schema]] = {"mlperf_dlrm_dcnv2": mlperf_schema}
"""Of recipes whose data need not be there to be planned for."""
