"""Fit the weights of a merge on validation rows, in float64.

Both fits are Newton's method with Levenberg-Marquardt damping on a convex function of M or M + 1 numbers. A pass over
the rows gives loss, gradient and Hessian; a fit takes about ten, each of N M^2 multiplications, and memory does not
grow with N beyond one float64 label and weight a row.

Stopping: at a point whose logloss (for stacked: plus ridge) is proven to be within TOLERANCE of the least possible, or
after MAX_PASSES. What `fit` promises below holds in either case, because the fits start from the mean logit and never
go up.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.merge.rows import Rows, losses
from recsys.merge.rules import FITTED, Merge

TOLERANCE = 1e-9
"""Nats, or that share of the loss where it is above 1 nat. Loglosses of seeds differ by 1e-5 and more."""
MAX_PASSES = 200
ROUNDING = 1e-12
"""What summing the rows may get wrong, in the same unit."""
RIDGE = 1.0
"""Of `stacked`, over all rows together: sum of losses + RIDGE / 2 (|weights - 1/M|^2 + bias^2).

That is a standard normal prior around the mean merge: a weight may move by about 1 before rows speak. Collinear members
need it: where logits correlate by .99, the difference of two has a variance of .02, and n rows tell their weights apart
to about 1 / sqrt(.002 n). At a million rows that is .02 and the ridge changes nothing; at a hundred rows it is above 2,
weights of +5 and -4 would follow noise, and the ridge keeps them near the mean. Identical members get equal weights."""


def fit(rule: str, logits_NM: Tensor, labels_N: Tensor, weights_N: Tensor | None = None) -> Merge:
    """Fit a merge rule on rows that no member was trained on; a rule that needs no fitting comes back as it is.

    - weighted: non-negative weights that sum to 1, with the least logloss of logits @ weights. Within TOLERANCE of
      the least; on these rows its logloss is at most that of mean_logit and at most that of the best single member.
    - stacked: logistic regression on the logits, with intercept and a ridge towards the mean merge (see RIDGE). On
      these rows its logloss is at most that of mean_logit.

    Both promises are to rounding of float64, and both fits are deterministic.

    Args:
        rule: a name of `recsys.merge.rules.NAMES`.
        logits_NM: logits of M members on N rows, in any precision.
        labels_N: 0 or 1.
        weights_N: how often each row counts, 0 or more; once where left out.

    Raises:
        ValueError: an unknown rule, labels that all agree, a member whose logits are not finite, shapes that do not
            fit.
    """
    if rule not in FITTED:
        return Merge(rule=rule)
    rows = Rows(logits_NM, labels_N, weights_N)
    counted = rows.labels_N[rows.weights_N > 0]
    if counted.min() == counted.max():
        raise ValueError(f"all labels are {counted[0]:.0f}: no fit is possible")
    return _weighted(rows) if rule == "weighted" else _stacked(rows)


def _weighted(rows: Rows) -> Merge:
    """Newton steps within the simplex, stopped by the Frank-Wolfe gap.

    The gap at weights w, g·w - min_m g_m with g the gradient, is at least f(w) - min f (Jaggi 2013, "Revisiting
    Frank-Wolfe", eq. 2).
    """

    def measure(weights_M: Tensor) -> _Point:
        loss, gradient_M, hessian_MM = _derivatives(rows, weights_M)
        gap = (gradient_M @ weights_M - gradient_M.min()).item()
        return _Point(weights_M, loss, gradient_M, hessian_MM, gap)

    found = _descend(_mean_weights(rows), measure, _step_in_simplex, _curvature_bound(rows, intercept=False))
    # What is left of the gap must not break the promise about the best single member.
    loglosses_M = rows.member_loglosses()
    best = int(loglosses_M.argmin())
    if loglosses_M[best] < found.loss - ROUNDING * max(1.0, found.loss):
        return Merge(rule="weighted", weights=tuple(float(member == best) for member in range(rows.num_members)))
    return Merge(rule="weighted", weights=tuple(found.x.tolist()))


def _stacked(rows: Rows) -> Merge:
    """Newton steps, stopped by strong convexity: f(x) - min f is at most |gradient|^2 / (2 ridge)."""
    ridge = RIDGE / rows.total
    mean = torch.cat([_mean_weights(rows), rows.labels_N.new_zeros(1)])

    def measure(x: Tensor) -> _Point:
        loss, gradient, hessian = _derivatives(rows, x)
        away = x - mean
        gradient = gradient + ridge * away
        hessian = hessian + ridge * torch.eye(len(x), dtype=x.dtype, device=x.device)
        gap = (gradient.square().sum() / (2 * ridge)).item()
        return _Point(x, loss + ridge / 2 * (away @ away).item(), gradient, hessian, gap)

    def step(point: _Point, hessian: Tensor) -> Tensor:
        return point.x - torch.linalg.solve(hessian, point.gradient)

    *weights, bias = _descend(mean, measure, step, _curvature_bound(rows, intercept=True)).x.tolist()
    return Merge(rule="stacked", weights=tuple(weights), bias=bias)


@dataclass(frozen=True)
class _Point:
    """What one pass over the rows tells about weights x [M], or weights and bias [M + 1]."""

    x: Tensor
    loss: float
    gradient: Tensor
    hessian: Tensor
    gap: float
    """At least loss - min loss."""


def _descend(
    start: Tensor, measure: Callable[[Tensor], _Point], step: Callable[[_Point, Tensor], Tensor], bound: float
) -> _Point:
    """Newton's method, damped: `step` minimises the quadratic model with Hessian + damping.

    A step that gains less than a thousandth of what the model says is taken back, and damped more. With a damping of
    `bound`, which no curvature exceeds, the model lies above the function and every step goes down.
    """
    point, damping = measure(start), 0.0
    for _ in range(MAX_PASSES):
        if point.gap <= TOLERANCE * max(1.0, point.loss):
            break
        # A floor, so that members that are copies of one another leave the model with one minimum.
        floor = max(damping, 1e-12 * bound)
        hessian = point.hessian + floor * torch.eye(len(start), dtype=start.dtype, device=start.device)
        trial = measure(step(point, hessian))
        move = trial.x - point.x
        promised = -(point.gradient @ move + move @ hessian @ move / 2).item()
        # Near the end what can be gained is lost in rounding, while the gradient still has digits.
        level = promised < ROUNDING * max(1.0, point.loss)
        if trial.gap < point.gap if level else point.loss - trial.loss >= 1e-3 * promised:
            point = trial
            damping = damping / 10 if damping > 1e-6 * bound else 0.0
        elif level and not damping:
            break
        else:
            damping = min(max(10 * damping, 1e-4 * bound), bound)
    return point


def _derivatives(rows: Rows, x: Tensor) -> tuple[float, Tensor, Tensor]:
    """Logloss of the merged logits, its gradient and its Hessian; x holds M weights, or those and a bias."""
    loss = 0.0
    gradient, hessian = torch.zeros_like(x), x.new_zeros(len(x), len(x))
    for logits_CM, labels_C, shares_C in rows.chunks():
        inputs = logits_CM if len(x) == rows.num_members else torch.nn.functional.pad(logits_CM, (0, 1), value=1.0)
        logit_C = inputs @ x
        p_C = torch.sigmoid(logit_C)
        loss += (shares_C @ losses(logit_C.unsqueeze(1), labels_C)).item()
        gradient += inputs.T @ (shares_C * (p_C - labels_C))
        hessian += inputs.T @ (inputs * (shares_C * p_C * torch.sigmoid(-logit_C)).unsqueeze(1))
    return loss, gradient, hessian


def _curvature_bound(rows: Rows, *, intercept: bool) -> float:
    """An upper bound of the Hessian's eigenvalues: p (1 - p) <= 1/4, so the mean of |inputs|^2 / 4."""
    squares = sum((shares_C @ logits_CM.square().sum(dim=1)).item() for logits_CM, _, shares_C in rows.chunks())
    return (squares + intercept) / 4


def _mean_weights(rows: Rows) -> Tensor:
    return rows.labels_N.new_full((rows.num_members,), 1.0 / rows.num_members)


def _step_in_simplex(point: _Point, hessian_MM: Tensor) -> Tensor:
    """Weights that minimise gradient·move + move·hessian·move / 2 within the simplex, by a primal active set.

    Members of weight 0 are out. Go to the minimum over those that are in, or until a weight reaches 0: then that
    member is out. At the minimum, take in the member that promises most; none does: done (Nocedal & Wright 2006,
    algorithm 16.3). Every iterate is in the simplex and none is worse than `point`.
    """
    # Of one scale with the constraint's ones.
    scale = hessian_MM.diagonal().mean()
    gradient_M, hessian_MM = point.gradient / scale, hessian_MM / scale
    weights_M = point.x.clone()
    inside_M = weights_M > 0
    for _ in range(10 * len(weights_M)):
        slope_M = gradient_M + hessian_MM @ (weights_M - point.x)
        members = inside_M.nonzero().squeeze(1)
        move = _move_of_sum_0(slope_M[members], hessian_MM[members][:, members])
        until_0 = torch.where(move < 0, -weights_M[members] / move, torch.inf)
        length = min(1.0, until_0.min().item())
        weights_M[members] += length * move
        if length < 1.0:
            out = members[until_0.argmin()]
            weights_M[out], inside_M[out] = 0.0, False
            continue
        slope_M = gradient_M + hessian_MM @ (weights_M - point.x)
        outside_M = slope_M.masked_fill(inside_M, torch.inf)
        if outside_M.min() >= slope_M[members].mean() - 1e-12 * slope_M.abs().max():
            break
        inside_M[outside_M.argmin()] = True
    weights_M = weights_M.clamp(min=0.0)
    return weights_M / weights_M.sum()


def _move_of_sum_0(slope: Tensor, hessian: Tensor) -> Tensor:
    """Minimise slope·move + move·hessian·move / 2 over moves that sum to 0, by its KKT system."""
    size = len(slope)
    system = torch.nn.functional.pad(hessian, (0, 1, 0, 1), value=1.0)
    system[size, size] = 0.0
    return torch.linalg.solve(system, torch.cat([-slope, slope.new_zeros(1)]))[:size]
