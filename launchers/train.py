"""torchx component for training: `torchx run -s SCHEDULER launchers/train.py:ddp -j NODESxRANKS -- RECIPE OPTIONS`.

It runs `recsys train` under torchrun on every node; on one machine, `-j 1x2` is two ranks, and `-j 2x1` two agents.
`recsys launch train` renders the same request, and fills in more.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Dict, List, Optional  # noqa: UP035  (torchx reads the annotations, and knows only these)

from torchx import specs

from recsys.launching.components import IMAGE, train


def ddp(  # noqa: PLR0913  (torchx reads a component's flags from the function that stands in the file)
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
    """Train on NODES x RANKS processes.

    Args:
        recipe_and_options: what follows `recsys train`
        j: nodes x ranks per node; LEAST:MOSTxRANKS goes on with as few nodes as the least
        cpu: cores per node
        gpu: GPUs per node
        memory_mb: memory per node
        h: named resource of a node, instead of cpu, gpu and memory_mb
        env: further environment variables
        max_retries: restarts of the workers after a failure; give the recipe --resume auto, so that they go on
        rdzv_port: port of the first node at which the nodes meet, where there are several
        image: container image, where the scheduler wants one
        mounts: what a container sees of its node: type=bind,src=FOLDER,dst=FOLDER,readonly
    """
    app = train(
        *recipe_and_options,
        j=j,
        cpu=cpu,
        gpu=gpu,
        memory_mb=memory_mb,
        h=h,
        env=env,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
        image=image,
        mounts=mounts,
    )
    # Schedulers start `torchrun` by name. Where it is not on PATH, because this environment was not activated, the one
    # beside this interpreter is meant; elsewhere (containers) PATH is left alone.
    beside = Path(sys.executable).parent
    if shutil.which("torchrun") is None and (beside / "torchrun").exists():
        for role in app.roles:
            role.env.setdefault("PATH", os.pathsep.join([str(beside), os.environ.get("PATH", os.defpath)]))
    return app
