"""Members of one make computed together: their parameters stacked, so that one batched call takes the place of several.

It saves launches of kernels, and costs a copy of the parameters a step: see benchmarks/README.md for where it pays.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from recsys.backbones.layers import Dropout
from recsys.members import MemberSpec

WARM_UPS, ROUNDS, STEPS = 3, 5, 4


def of_one_make(specs: Sequence[MemberSpec]) -> list[list[int]]:
    """Indices of members that have backbone, sizes and widths in common, in groups of two or more."""
    groups: dict[object, list[int]] = {}
    for index, spec in enumerate(specs):
        groups.setdefault((spec.backbone, spec.sizes, spec.model), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


class Together:
    """Some members of a job, which stay the owners of their parameters; gradients come to them.

    Args:
        indices: of these members among all.
        members: alike but for the values of their parameters.
    """

    def __init__(self, indices: Sequence[int], members: Sequence[nn.Module]) -> None:
        self.indices, self.first = list(indices), members[0]
        self.on = False
        """Whether they are computed together; see `RecModel.choose`."""
        self._parameters = {name: [m.get_parameter(name) for m in members] for name, _ in self.first.named_parameters()}
        # One call for all would draw one mask for all, from one member's stream.
        self._drops = any(isinstance(part, Dropout) and part.p > 0 for part in self.first.modules())

    @property
    def active(self) -> bool:
        """Whether now: members that drop values draw from a stream each, so in training one after another."""
        return self.on and not (self._drops and self.first.training)

    def __call__(self, fields: Sequence[Tensor], dense_BN: Tensor) -> Tensor:
        """One x_BFD for all members of the job or one each, and the dense columns, to logits [members here, B]."""

        def one(parameters: dict[str, Tensor], x_BFD: Tensor) -> Tensor:
            logit_B: Tensor = functional_call(self.first, parameters, (x_BFD, dense_BN))
            return logit_B

        stacked = {name: _stack(parameters) for name, parameters in self._parameters.items()}
        if len(fields) == 1:
            return vmap(one, in_dims=(0, None))(stacked, fields[0])
        return vmap(one)(stacked, torch.stack([fields[index] for index in self.indices]))


def _stack(parameters: Sequence[Tensor]) -> Tensor:
    # Flat, so that the gradient of a [1, K] comes with strides (K, 1), as DistributedDataParallel wants it.
    return torch.stack([parameter.flatten() for parameter in parameters]).view(-1, *parameters[0].shape)


def is_faster_together(group: Together, members: nn.Module, fields: Sequence[Tensor], dense_BN: Tensor) -> bool:
    """Measure forward and backward of all members, with and without the group, on inputs of the real shapes."""
    was_on, was_training = group.on, members.training
    # Dropout would draw from the members' streams.
    members.eval()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for round_ in range(WARM_UPS + ROUNDS):
        for on in (True, False):
            group.on = on
            taken = _seconds(lambda: _forward_backward(members, fields, dense_BN), dense_BN.device)
            if round_ >= WARM_UPS:
                seconds[on].append(taken)
    group.on = was_on
    members.train(was_training)
    return min(seconds[True]) < min(seconds[False])


def _forward_backward(members: nn.Module, fields: Sequence[Tensor], dense_BN: Tensor) -> None:
    logits_BM = members(fields, dense_BN)
    # Into no parameter's .grad, and past the hooks that wait for gradients there.
    torch.autograd.grad(logits_BM.float().sum(), [*fields, *members.parameters()], allow_unused=True)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    for _ in range(STEPS):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
