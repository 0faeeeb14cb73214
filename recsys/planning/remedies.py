"""What would make a workload fit that does not."""

from dataclasses import replace

from recsys.config import InputError
from recsys.sharding.cluster import Cluster
from recsys.sharding.config import ShardingConfig
from recsys.sharding.make import cost_model, make_plan
from recsys.sharding.quote import quote
from recsys.sharding.workload import Workload

MOST_NODES = 4096


def remedies(workload: Workload, cluster: Cluster, config: ShardingConfig) -> list[str]:
    """Changes that make it fit, each alone, with the step that comes of it.

    Args:
        workload: what does not fit.
        cluster: where.
        config: under which bounds; a pinned plan is not kept.
    """
    config = replace(config, plan=None)
    found = []
    if workload.optimizer == "adagrad":
        row_wise = replace(workload, optimizer="rowwise_adagrad")
        found.append(_tried("--optimizer rowwise_adagrad", row_wise, cluster, config))
    if any(table.dtype == "fp32" for table in workload.tables):
        half = replace(workload, tables=tuple(replace(table, dtype="fp16") for table in workload.tables))
        found.append(_tried("--table-dtype fp16", half, cluster, config))
    for kernel in ("fused_uvm_caching", "key_value"):
        if kernel not in config.kernels and (
            cluster.hardware.host_gib if "uvm" in kernel else cluster.hardware.ssd_gib
        ):
            more = replace(config, kernels=(*config.kernels, kernel))
            found.append(_tried(f"--sharding.kernels {' '.join(more.kernels)}", workload, cluster, more))
    nodes = cluster.nodes * 2
    while nodes <= MOST_NODES:
        wider = replace(cluster, nodes=nodes)
        line = _tried(f"--cluster {wider.name}", workload, wider, config)
        found.append(line)
        if line:
            break
        nodes *= 2
    return [line for line in found if line]


def _tried(change: str, workload: Workload, cluster: Cluster, config: ShardingConfig) -> str | None:
    try:
        model = cost_model(workload, cluster, config)
        priced = quote(make_plan(model, config), model, reserve=config.reserve)
    except InputError:
        return None
    return f"{change} ({priced.pipelined_seconds * 1e3:,.2f} ms a step)" if priced.fits else None
