"""Clusters by name, and from files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from recsys.config import InputError, dump
from recsys.sharding.cluster import HARDWARE, Cluster, Rates, parse_cluster


@pytest.mark.parametrize(
    ("text", "name", "ranks", "nodes"),
    [
        ("h200", "h200", 1, 1),
        ("h200x8", "h200", 8, 1),
        ("h200x8x16", "h200", 8, 16),
        ("a100-40x8", "a100-40", 8, 1),
        ("gb200x72x2", "gb200", 72, 2),
        ("cpux2", "cpu", 2, 1),
    ],
)
def test_a_cluster_is_read(text: str, name: str, ranks: int, nodes: int) -> None:
    cluster = parse_cluster(text)
    assert cluster == Cluster(hardware=HARDWARE[name], ranks_per_node=ranks, nodes=nodes)
    assert cluster.world_size == ranks * nodes
    assert parse_cluster(cluster.name) == cluster


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_hardware_of_ones_own_comes_from_a_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"own.{suffix}"
    values = dump(HARDWARE["h100"]) | {"name": "own", "memory_gib": 60.0}
    path.write_text(json.dumps(values))  # which is YAML too
    cluster = parse_cluster(f"{path}x8x2")
    assert (cluster.hardware.name, cluster.hardware.memory_gib) == ("own", 60.0)
    assert (cluster.ranks_per_node, cluster.nodes) == (8, 2)
    path.write_text(json.dumps({**values, "memory_gb": 60}))
    with pytest.raises(InputError, match=r"memory_gb.*did you mean .*memory_gbs"):
        parse_cluster(f"{path}x8")
    path.write_text(json.dumps({**values, "memory_gbs": -1}))
    with pytest.raises(InputError, match=r"memory_gbs -1.* must be above 0"):
        parse_cluster(str(path))
    path.write_text(json.dumps({**values, "rates": {"lookups": {}}}))
    with pytest.raises(InputError, match=r"rates names 'lookups'; did you mean lookup"):
        parse_cluster(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h20x8", "--cluster h20x8: unknown hardware 'h20'; did you mean h200"),
        ("tpu", "--cluster tpu: unknown hardware 'tpu'"),
        ("h200x0", "--cluster h200x0: a cluster of 1 nodes of 0 ranks"),
        ("nowhere.yamlx8", "--cluster nowhere.yamlx8: no such file as nowhere.yaml"),
        ("h200x8x", "--cluster h200x8x: unknown hardware"),
    ],
)
def test_no_such_cluster(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        parse_cluster(text)
    assert "\n" not in str(caught.value)


def test_zero_ranks_are_one_or_refused() -> None:
    with pytest.raises(InputError, match="at least 1 of each"):
        parse_cluster("h200x8x0")


def test_replicas_share_nodes_evenly() -> None:
    assert parse_cluster("h100x8x4").group(2) == parse_cluster("h100x8x2")
    assert parse_cluster("h100x8").group(2) == parse_cluster("h100x4")
    with pytest.raises(InputError, match="3 replicas cannot share 4 nodes of 8 ranks evenly"):
        parse_cluster("h100x8x4").group(3)


def test_ranks_that_share_cores_wait_for_one_another() -> None:
    two, four = parse_cluster("cpux2"), parse_cluster("cpux4")
    assert two.hardware.cores == 2
    seconds = np.array([[1.0], [1.0], [0.0], [0.0]])
    np.testing.assert_allclose(two.shared(seconds[:2]).max(axis=0), [1.0])
    np.testing.assert_allclose(four.shared(seconds).max(axis=0), [1.0], err_msg="two cores do the work of two ranks")
    np.testing.assert_allclose(four.shared(np.ones((4, 1))).max(axis=0), [2.0])


def test_rates_of_data_sheets_and_measured_ones() -> None:
    sheet = HARDWARE["h100"].rate("output_dist", across_nodes=True)
    assert sheet.node_gbs == pytest.approx(450 * 0.7)
    assert sheet.network_gbs == pytest.approx(50 * 0.7)
    with pytest.raises(ValueError, match="call_us -1"):
        Rates(call_us=-1)
    with pytest.raises(ValueError, match="node_gbs 0"):
        Rates(node_gbs=0)
