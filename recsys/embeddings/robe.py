"""ROBE: all tables of an owner are views of one small array (2207.10731; ROBE 2108.02191)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.embeddings import robe_machine, robe_tensors
from recsys.embeddings.bounds import IdBounds
from recsys.embeddings.config import TABLE_SEPARATOR, Owner
from recsys.embeddings.init import fill_uniform
from recsys.embeddings.robe_hash import Bags, RobeHash, robe_hash


class Robe(nn.Module):
    """One array an owner, of `compression` times fewer floats than its tables would have.

    Args:
        sparse: feature to number of ids, in field order.
        owners: whose arrays.

    Raises:
        InputError: an array that cannot be, naming what could.
    """

    def __init__(self, sparse: Mapping[str, int], owners: Sequence[Owner]) -> None:
        super().__init__()
        self.bounds = IdBounds(sparse)
        self.by_owner = nn.ModuleDict({owner.name: RobeArray(sparse, owner) for owner in owners})

    def forward(self, ids: KeyedJaggedTensor) -> list[Tensor]:
        """Look up ids, and sum those of one row and feature: one x_BFD an owner, fields in schema order.

        Raises:
            InputError: an id that is none of the feature's, see `bounds`.
        """
        self.bounds(ids)
        return [array(ids) for array in self.by_owner.values()]


class RobeArray(nn.Module):
    """The array of one owner; see RobeHash for the formula. It is fp32, and its values do not depend on a device.

    Its gradient is dense, so that data parallelism and any optimizer can have it. But a batch touches few of an array's
    tens of millions of floats, and Adagrad does nothing where a gradient is 0: on one rank with a CPU, `fuse` has the
    backward update just what was touched.
    """

    def __init__(self, sparse: Mapping[str, int], owner: Owner) -> None:
        super().__init__()
        self.features = list(sparse)
        self.hash = robe_hash(sparse, owner)
        if torch.get_default_device().type == "meta":
            self.array = nn.Parameter(torch.empty(self.hash.num_floats))
        else:
            # NumPy asks the kernel for huge pages, torch does not.
            self.array = nn.Parameter(torch.from_numpy(np.empty(self.hash.num_floats, np.float32)))
            seed = TABLE_SEPARATOR.join((owner.seed, "robe"))
            with torch.no_grad():
                fill_uniform(self.array[:, None], seed, owner.config.init_scale, first=(0, 0), num_columns=1)
        self.update: FusedAdagrad | None = None

    def fuse(self, optimizer: torch.optim.Adagrad) -> None:
        """Let each backward update the array as this optimizer would, and leave no gradient for it."""
        self.update = FusedAdagrad(optimizer, self.array, self.hash)

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        """Look up ids: x_BFD."""
        assert ids.weights_or_none() is None, "weighted ids are not looked up"
        keys = ids.keys()
        assert len(keys) == len(self.features), "of this schema"
        columns_F = [keys.index(feature) for feature in self.features]
        bags = Bags(ids.values(), ids.offsets(), columns_F, ids.stride())
        return _LookUp.apply(self.array, self, bags)  # type: ignore[no-untyped-call]


class FusedAdagrad:
    """Adagrad of an array within its backward; rates and state are those of an optimizer, which finds no gradient."""

    def __init__(self, optimizer: torch.optim.Adagrad, array: nn.Parameter, robe: RobeHash) -> None:
        self._optimizer, self._array, self._hash = optimizer, array, robe
        state = optimizer.state[array]
        state["sum"] = torch.from_numpy(np.zeros(len(array), np.float32)).copy_(state["sum"])  # in huge pages too
        self._sums = robe_machine.zero(robe)

    def __call__(self, lookup: robe_machine.Lookup, grad_BFD: Tensor) -> None:
        """Update the array by the gradient of one lookup."""
        group = next(g for g in self._optimizer.param_groups if any(p is self._array for p in g["params"]))
        rates = robe_machine.Rates(self._optimizer.state[self._array]["sum"], group["lr"], group["eps"])
        robe_machine.update(self._array, self._sums, self._hash, lookup, grad_BFD, rates)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, array_m: Tensor, robe: RobeArray, bags: Bags) -> Tensor:
        place = robe_machine if array_m.device.type == "cpu" else robe_tensors
        x_BFD, lookup = place.look_up(array_m, robe.hash, bags)
        ctx.place, ctx.robe, ctx.lookup = place, robe, lookup
        return x_BFD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BFD: Tensor) -> tuple[Tensor | None, None, None]:
        robe: RobeArray = ctx.robe
        if robe.update:
            robe.update(ctx.lookup, grad_BFD)
            return None, None, None
        return ctx.place.gradient(robe.hash, ctx.lookup, grad_BFD), None, None
