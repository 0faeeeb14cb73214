"""Named resources: what a node of a usual kind offers, for `recsys launch --resource` and torchx's `-h`.

They are a little less than such a machine has, since its system and its scheduler keep some of it: jobs that ask for
everything wait for ever. Entry points in pyproject.toml make them known to torchx, beside its own (`aws_p5.48xlarge`).
"""

from torchx.specs import Resource

GIB = 1024
"""In torchx's unit of memory, MiB."""


def cpu_small() -> Resource:
    """4 cores, 14 GiB: a try-out, or a study that starts its jobs on a scheduler."""
    return Resource(cpu=4, gpu=0, memMB=14 * GIB)


def cpu_large() -> Resource:
    """32 cores, 240 GiB: `recsys prepare` of a terabyte."""
    return Resource(cpu=32, gpu=0, memMB=240 * GIB)


def a100x8() -> Resource:
    """Eight A100, as in a DGX A100 or AWS p4d."""
    return Resource(cpu=92, gpu=8, memMB=1000 * GIB)


def h100x8() -> Resource:
    """Eight H100, as in a DGX H100 or AWS p5."""
    return Resource(cpu=184, gpu=8, memMB=1800 * GIB)


def h200x8() -> Resource:
    """Eight H200, as in a DGX H200 or AWS p5e."""
    return Resource(cpu=184, gpu=8, memMB=1800 * GIB)
