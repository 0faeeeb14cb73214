"""Loss scaling for fp16, whose smallest gradients would else be 0."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

FIRST_SCALE = 2.0**12
"""torch's 2^16 overflows in the first steps of mean losses over a batch, which are steps lost."""
GROWTH_INTERVAL = 2000
"""Steps without an overflow after which the scale grows."""


class LossScaler:
    """Scales the loss up by as much as its gradients can bear.

    That is half as much after a step that overflowed, which is skipped, and twice as much after 2000 that did not.
    Gradients of the embeddings are scaled down on their way into them, see `EmbeddingGradients`.

    Args:
        params: that take scaled gradients.
        device: of them.

    Attributes:
        scale: of the loss.
    """

    def __init__(self, params: Sequence[nn.Parameter], device: torch.device) -> None:
        self._params = params
        self.scale = torch.full((1,), FIRST_SCALE, device=device)
        self._good_steps = torch.zeros(1, dtype=torch.int32, device=device)

    def unscale(self) -> bool:
        """Scale gradients down, and set the next scale; says whether all of them are finite."""
        grads = [param.grad for param in self._params if param.grad is not None]
        overflow = torch.zeros(1, device=self.scale.device)
        torch._amp_foreach_non_finite_check_and_unscale_(grads, overflow, 1.0 / self.scale)
        torch._amp_update_scale_(self.scale, self._good_steps, overflow, 2.0, 0.5, GROWTH_INTERVAL)
        return not overflow.item()

    def state(self) -> dict[str, Tensor]:
        """Scale, and steps since it last changed."""
        return {"scale": self.scale, "good_steps": self._good_steps}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take them over."""
        for name, value in self.state().items():
            value.copy_(state[name])
