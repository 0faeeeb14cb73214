"""torchx components: what a job of each verb asks of a scheduler.

`recsys launch` renders them, and `torchx run recsys/launching/components.py:train` does so from a checkout.
"""

from typing import Dict, List, Optional  # noqa: UP035  (torchx reads the annotations, and knows only these)

from torchx import specs
from torchx.components import dist

# A restarted worker over gloo must not read the addresses of the attempt before from the agent's store.
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# torchrun hands these on to its ranks, which save; SIGUSR1 is not among its own.
SIGNALS = "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
IMAGE = "recsys:latest"


def train(  # noqa: PLR0913  (the flags of a torchx component are its arguments)
    *recipe_and_options: str,
    j: str = "1x2",
    cpu: int = 2,
    gpu: int = 0,
    memory_mb: int = 4096,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    image: str = IMAGE,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """`recsys train` under torchrun on every node.

    Args:
        recipe_and_options: what follows `recsys train`
        j: nodes x ranks of each; LEAST:MOSTxRANKS goes on with as few nodes as the least
        cpu: cores per node
        gpu: GPUs per node
        memory_mb: memory per node
        h: named resource of a node, instead of cpu, gpu and memory_mb
        env: further environment variables
        max_retries: restarts after a failure, of the workers by torchrun and of the job by its scheduler
        rdzv_port: port of the first node at which the nodes meet, where there are several
        image: container image, where the scheduler wants one
        mounts: what a container sees of its node: type=bind,src=FOLDER,dst=FOLDER,readonly
    """
    component = getattr(dist, "torchrun", dist.ddp)  # torchx's nightly line renamed it
    app = component(
        "train",
        *recipe_and_options,
        m="recsys.cli",
        name="recsys-train",
        image=image,
        cpu=cpu,
        gpu=gpu,
        memMB=memory_mb,
        h=h,
        j=j,
        # torchx hands max_retries to the scheduler alone; this is what makes torchrun restart workers.
        env={**ENVIRONMENT, "PET_MAX_RESTARTS": str(max_retries), **(env or {})},
        max_retries=max_retries,
        rdzv_port=rdzv_port,
        mounts=mounts,
    )
    (role,) = app.roles
    role.name = "train"
    # An option, and no variable PET_SIGNALS_TO_HANDLE: Slurm's srun splits values of variables at their commas.
    program, options = role.args[-1].split(" ", maxsplit=1)  # of bash -c "torchrun ..."
    role.args[-1] = f"{program} {SIGNALS} {options}"
    return app


def prepare(
    *format_and_options: str,
    cpu: int = 4,
    memory_mb: int = 8192,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    image: str = IMAGE,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """`recsys prepare` on one node, which goes on where an earlier attempt stopped.

    Args:
        format_and_options: what follows `recsys prepare`
        cpu: cores of the node
        memory_mb: memory of the node; tell prepare by its own --memory
        h: named resource, instead of cpu and memory_mb
        env: further environment variables
        max_retries: restarts of the job by its scheduler after a failure
        image: container image, where the scheduler wants one
        mounts: what a container sees of its node: type=bind,src=FOLDER,dst=FOLDER,readonly
    """
    resource = specs.resource(cpu=cpu, gpu=0, memMB=memory_mb, h=h)
    return _one_process("prepare", format_and_options, image, resource, env, max_retries, mounts)


def study(
    *kind_and_options: str,
    cpu: int = 2,
    gpu: int = 0,
    memory_mb: int = 8192,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    image: str = IMAGE,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """`recsys study` on one node, which goes on where an earlier attempt stopped.

    Args:
        kind_and_options: what follows `recsys study`
        cpu: cores of the node
        gpu: GPUs of the node
        memory_mb: memory of the node
        h: named resource, instead of cpu, gpu and memory_mb
        env: further environment variables
        max_retries: restarts of the job by its scheduler after a failure
        image: container image, where the scheduler wants one
        mounts: what a container sees of its node: type=bind,src=FOLDER,dst=FOLDER,readonly
    """
    resource = specs.resource(cpu=cpu, gpu=gpu, memMB=memory_mb, h=h)
    return _one_process("study", kind_and_options, image, resource, env, max_retries, mounts)


def _one_process(
    verb: str,
    arguments: tuple[str, ...],
    image: str,
    resource: specs.Resource,
    env: Optional[Dict[str, str]],
    max_retries: int,
    mounts: Optional[List[str]],
) -> specs.AppDef:
    role = specs.Role(
        name=verb,
        image=image,
        entrypoint="python",
        args=["-m", "recsys", verb, *arguments],
        resource=resource,
        env=dict(env or {}),
        max_retries=max_retries,
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(name=f"recsys-{verb}", roles=[role])
