"""Exponential moving averages of parameters, with which a run validates."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages, in fp32: a = d a + (1 - d) p after every step; they begin as the parameters.

    Args:
        params: by name, equal on all ranks.
        decay: d.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._params = dict(params)
        self._averages = {name: param.detach().float().clone() for name, param in params.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are."""
        params = [param.detach().float() for param in self._params.values()]
        torch._foreach_lerp_(list(self._averages.values()), params, 1 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the parameters their averages while the block runs."""
        own = {name: param.detach().clone() for name, param in self._params.items()}
        self.apply()
        try:
            yield
        finally:
            self._set(own)

    def restart(self) -> None:
        """Begin anew with the parameters as they are."""
        for name, param in self._params.items():
            self._averages[name].copy_(param.detach())

    def apply(self) -> None:
        """Give the parameters their averages for good."""
        self._set(self._averages)

    def state(self) -> dict[str, Tensor]:
        """The averages, by the parameters' names."""
        return dict(self._averages)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over averages."""
        for name, average in self._averages.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, param in self._params.items():
            param.copy_(values[name])
