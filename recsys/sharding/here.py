"""The cluster that a job runs on, as plans see it."""

from dataclasses import replace

import psutil
import torch

from recsys.sharding.cluster import GIB, HARDWARE, Cluster, Hardware, parse_cluster


def cluster_here(hardware: str | None, device: torch.device, world_size: int, local_size: int) -> Cluster:
    """Ranks of a job in their nodes.

    Args:
        hardware: profile that the user names; found by the device's name where left out.
        device: of this rank.
        world_size: ranks of the job.
        local_size: ranks of this node.

    Raises:
        InputError: an unknown profile.
    """
    own = parse_cluster(hardware).hardware if hardware else hardware_here(device, local_size)
    return Cluster(hardware=own, ranks_per_node=local_size, nodes=max(world_size // local_size, 1))


def hardware_here(device: torch.device, local_size: int) -> Hardware:
    """The profile of this machine, with the memory that it has."""
    host = psutil.virtual_memory().total / GIB / local_size
    if device.type == "cpu":
        return replace(HARDWARE["cpu"], memory_gib=host, cores=psutil.cpu_count(logical=False) or 1)
    properties = torch.cuda.get_device_properties(device)
    name, memory = properties.name.lower(), properties.total_memory / GIB
    known = [own for own in HARDWARE.values() if own.device == "cuda" and own.name.split("-")[0] in name.split()]
    # The unknown is priced as an H100: plans are compared with one another, and proportions are much alike.
    nearest = min(known or [HARDWARE["h100"]], key=lambda own: abs(own.memory_gib - memory))
    return replace(nearest, memory_gib=memory, host_gib=host)
