"""What `recsys launch` is told. It imports no torchx, so that help is instant."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

_SHAPE = re.compile(r"(?:(?P<least>\d+):)?(?P<nodes>\d+)x(?P<ranks>\d+)")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where to run which verb: `recsys launch VERB OPTIONS -- WHAT FOLLOWS THE VERB`.

    What is not given is taken from .torchxconfig, here or in the home folder: the scheduler from `scheduler` of its
    section [cli:run], its options from the section of its name, and the others from [component:recsys.VERB], under the
    names j, h (which is --resource), cpu, gpu, memory_mb, env, max_retries, rdzv_port, image and mounts.
    """

    verb: Positional[Literal["train", "prepare", "study"]]
    """What runs: train on every node under torchrun, the others as one process."""
    scheduler: Annotated[str | None, arg(aliases=["-s"])] = None
    """local_cwd, local_docker, slurm, kubernetes, aws_batch or ray; local_cwd if .torchxconfig names none."""
    shape: Annotated[str | None, arg(name="j", aliases=["-j"])] = None
    """Of train: NODESxRANKS, such as 4x8; LEAST:MOSTxRANKS (1:4x8) goes on with fewer nodes."""
    resource: Annotated[str | None, arg(aliases=["-r"])] = None
    """What a node has, by name: cpu_small, cpu_large, a100x8, h100x8, h200x8, or one of torchx's own."""
    cpu: int | None = None
    """Cores of a node, where no resource is named."""
    gpu: int | None = None
    """GPUs of a node, where no resource is named."""
    memory_mb: int | None = None
    """Memory of a node in MiB, where no resource is named."""
    image: str | None = None
    """Container image with recsys in it; recsys:latest when not given."""
    mounts: tuple[str, ...] = ()
    """What containers see of their nodes: type=bind,src=FOLDER,dst=FOLDER,readonly. local_docker gets the folders of
    the job by itself."""
    env: tuple[str, ...] = ()
    """Environment variables of the job, NAME=VALUE."""
    max_retries: int | None = None
    """Restarts after a failure; train then goes on from its newest checkpoint."""
    rdzv_port: int | None = None
    """Of train: port of the first node at which the nodes meet; 29500 when not given."""
    cfg: tuple[str, ...] = ()
    """Options of the scheduler, NAME=VALUE, such as partition=a100; `torchx runopts SCHEDULER` lists them."""
    workspace: str | None = None
    """Folder whose files go with the job: built into the image by docker, or sent to the Ray cluster."""
    dryrun: bool = False
    """Print the request, and send nothing."""

    def __post_init__(self) -> None:
        if self.shape is not None:
            if self.verb != "train":
                raise ValueError(f"-j {self.shape}: {self.verb} is one process; leave -j out")
            read_shape(self.shape)
        for name, given, least in (
            ("cpu", self.cpu, 1),
            ("gpu", self.gpu, 0),
            ("memory_mb", self.memory_mb, 1),
            ("max_retries", self.max_retries, 0),
            ("rdzv_port", self.rdzv_port, 1),
        ):
            if given is not None and given < least:
                raise ValueError(f"{name} {given} must be at least {least}")
        for name in ("env", "cfg"):
            for pair in getattr(self, name):
                if "=" not in pair:
                    raise ValueError(f"{name} {pair!r} is no NAME=VALUE")
        if self.verb != "train" and self.rdzv_port is not None:
            raise ValueError(f"rdzv_port {self.rdzv_port}: {self.verb} is one process; leave it out")
        if self.verb == "prepare" and self.gpu:
            raise ValueError(f"gpu {self.gpu}: prepare uses none; leave it out")


def read_shape(text: str) -> tuple[range, int]:
    """The numbers of nodes that a shape allows, and the ranks on each.

    Raises:
        ValueError: it is none.
    """
    match = _SHAPE.fullmatch(text)
    if match:
        most, ranks = int(match["nodes"]), int(match["ranks"])
        least = int(match["least"] or most)
        if 1 <= least <= most and ranks >= 1:
            return range(least, most + 1), ranks
    raise ValueError(f"-j {text!r} is no shape; write NODESxRANKS (4x8) or LEAST:MOSTxRANKS (1:4x8)")
