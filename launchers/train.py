"""torchx component for training: `torchx run -s SCHEDULER launchers/train.py:ddp -j NODESxRANKS -- RECIPE OPTIONS`.

It runs `recsys train` under torchrun on every node; on one machine, `-j 1x2` is two ranks, and `-j 2x1` two agents.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Dict, Optional  # noqa: UP035  (torchx reads the annotations, and knows only these)

from torchx import specs
from torchx.components import dist

# A restarted worker over gloo must not read the addresses of the attempt before from the agent's store.
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def ddp(  # noqa: PLR0913  (the flags of a torchx component are its arguments)
    *recipe_and_options: str,
    j: str = "1x2",
    cpu: int = 2,
    gpu: int = 0,
    memory_mb: int = 4096,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    image: str = "recsys:latest",
) -> specs.AppDef:
    """Train on NODES x RANKS processes.

    Args:
        recipe_and_options: what follows `recsys train`
        j: nodes x ranks per node
        cpu: cores per node
        gpu: GPUs per node
        memory_mb: memory per node
        h: named resource of a node, instead of cpu, gpu and memory_mb
        env: further environment variables
        max_retries: restarts of the workers after a failure; give the recipe --resume, so that they go on
        rdzv_port: port of the first node at which the nodes meet, where there are several
        image: container image, where the scheduler wants one
    """
    component = getattr(dist, "torchrun", dist.ddp)  # the nightly line renamed it
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
    )
    # Schedulers start `torchrun` by name. Where it is not on PATH, because this environment was not activated, the one
    # beside this interpreter is meant; elsewhere (containers) PATH is left alone.
    beside = Path(sys.executable).parent
    if shutil.which("torchrun") is None and (beside / "torchrun").exists():
        for role in app.roles:
            role.env.setdefault("PATH", os.pathsep.join([str(beside), os.environ.get("PATH", os.defpath)]))
    return app
