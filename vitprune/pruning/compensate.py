r"""Make good what removal costs, in closed form and without labels.

With kept neurons S, removed ones P, mean μ and centred covariance C of the hidden neurons on calibration images,

.. math::
    B = C_{PS} (C_{SS} + \lambda I)^{-1}, \quad W' = W_S + W_P B, \quad b' = b + W_P (\mu_P - B \mu_S)

is the least-squares reconstruction of the FFN's output from the kept neurons.

Letters: D embedding width, H hidden neurons, S kept, P removed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from vitprune.calibration.statistics import Statistics
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.attention import HEADS, VO
from vitprune.models.units import FFN
from vitprune.options import COMPENSATIONS, DEFAULT_RIDGE, check_choice
from vitprune.pruning.plan import Plan, fit_plan


def reconstruct(statistics: Statistics, keep_H: Tensor, *, ridge: float = DEFAULT_RIDGE) -> Tensor:
    """Return B [P, S], the best linear map from centred kept neurons to centred removed ones.

    Args:
        statistics: of the hidden neurons, with ``moments``.
        keep_H: bool.
        ridge: λ relative to the mean variance; positive.
    """
    return regress(statistics, keep_H, statistics.covariance_HH[keep_H][:, ~keep_H], ridge=ridge)


def regress(statistics: Statistics, keep_H: Tensor, cross_SX: Tensor, *, ridge: float) -> Tensor:
    """Return the coefficients [X, S] of a ridge regression on the centred kept neurons.

    Args:
        statistics: of the hidden neurons, with ``moments``.
        keep_H: bool.
        cross_SX: covariance of the kept neurons with what is to be explained; float64.
        ridge: λ relative to the mean variance of all neurons; positive.
    """
    covariance_HH = statistics.covariance_HH
    kept_SS = covariance_HH[keep_H][:, keep_H].clone()
    # A dead FFN has no variance at all; the smallest normal number keeps its system solvable (coefficients 0).
    damping = max(ridge * float(covariance_HH.diagonal().mean()), torch.finfo(torch.float64).tiny)
    kept_SS.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(kept_SS)
    if int(failed) == 0:
        return torch.cholesky_solve(cross_SX, factor).T
    # Rounding made a nearly singular matrix indefinite: solve it by its eigenvalues, none below the damping.
    values, vectors = torch.linalg.eigh(kept_SS)
    return (vectors @ ((vectors.T @ cross_SX) / values.clamp_min(max(damping, 1e-300)).unsqueeze(1))).T


def check_ridge(ridge: float) -> None:
    """Refuse a regularisation that is not positive and finite.

    Raises:
        VitpruneError: naming the value.
    """
    if not 0 < ridge < math.inf:
        raise VitpruneError(f"ridge must be positive, got {ridge}")


def write_down_proj(down: nn.Linear, weight_DH: Tensor, shift_D: Tensor) -> None:
    """Set an output projection's weight in place and add to its bias, which it gets if it has none."""
    down.weight.copy_(weight_DH)
    if down.bias is None:
        down.bias = nn.Parameter(torch.zeros_like(down.weight[:, 0]))
    down.bias.add_(shift_D.to(down.bias.device, down.bias.dtype))


def move_means(weight_DH: Tensor, statistics: Statistics, keep_H: Tensor, *, ridge: float) -> tuple[Tensor, Tensor]:
    """Return an output projection as it is, and what removed units add to its bias on average.

    Args:
        weight_DH: of the projection.
        statistics: of the units that it reads, with ``moments``.
        keep_H: bool.
        ridge: not used: nothing is solved.

    Returns:
        The weight [D, H], with the columns of removed units as they were, and the shift [D]; float64.
    """
    weight_DH = weight_DH.double()
    return weight_DH, weight_DH[:, ~keep_H] @ statistics.mean_H[~keep_H]


def stand_in(weight_DH: Tensor, statistics: Statistics, keep_H: Tensor, *, ridge: float) -> tuple[Tensor, Tensor]:
    """Return an output projection whose kept units stand in for the others, and what to add to its bias.

    Arguments and result as in ``move_means``; ``ridge`` is λ relative to the mean variance of the units, positive.
    """
    weight_DH = weight_DH.double()
    map_PS = reconstruct(statistics, keep_H, ridge=ridge)
    mean_P = statistics.mean_H[~keep_H] - map_PS @ statistics.mean_H[keep_H]
    weight_DH = weight_DH.index_add(1, keep_H.nonzero().squeeze(1), weight_DH[:, ~keep_H] @ map_PS)
    return weight_DH, weight_DH[:, ~keep_H] @ mean_P


# Compensations of one projection from the statistics of what it reads alone.
STAND_INS: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {"bias": move_means, "ridge": stand_in}


@entry
@torch.no_grad()
def compensate(
    model: nn.Module,
    plan: Plan,
    statistics: Mapping[str, Statistics],
    *,
    compensation: str = "ridge",
    ridge: float = DEFAULT_RIDGE,
) -> nn.Module:
    """Return a copy whose kept units and biases stand in for the ones that the plan removes.

    Shapes stay; the columns of removed units are left as they were, for ``mask_neurons`` or ``remove_neurons`` to
    take out. An output projection without bias gets one.

    Args:
        model: the dense model.
        plan: which units stay; nothing stands in for queries, keys and whole layers.
        statistics: of the dense model's groups, with ``moments``; of heads, those of their values.
        compensation: ``none``, ``bias`` or ``ridge``.
        ridge: λ relative to the mean variance of the units; positive.

    Raises:
        VitpruneError: if the plan is not for this model, or an argument is out of range.

    Source:
        Second-order reconstruction as in Optimal Brain Surgeon, applied to FFN neurons by CORP (arXiv:2602.05243) and
        others; ``bias`` is its special case B = 0.

    >>> import timm
    >>> from vitprune import find_feed_forwards, measure_statistics
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]
    >>> statistics = measure_statistics(model, find_feed_forwards(model), batches, {"moments"})
    >>> plan = Plan({"blocks.0.mlp": torch.arange(768) < 700})
    >>> compensate(model, plan, statistics, compensation="bias").blocks[0].mlp.fc2.weight.shape
    torch.Size([192, 768])
    """
    check_choice("compensation", compensation, {name: COMPENSATIONS[name] for name in ("none", *STAND_INS)})
    check_ridge(ridge)
    groups = fit_plan(model, plan)
    result = copy.deepcopy(model)
    solve = STAND_INS.get(compensation)
    for group in groups if solve else ():
        removed = plan.removed(group.name)
        if group.kind not in (FFN, VO, HEADS) or group.module in plan.left_out or len(removed) == 0:
            continue
        reader = result.get_submodule(group.read_by)
        keep_H = torch.ones(reader.in_features, dtype=torch.bool)
        keep_H[group.columns(removed)] = False
        # A head is made good by what the projection reads of the others, as a dimension of the values is.
        measured = statistics[f"{group.module}.{VO}" if group.kind == HEADS else group.name]
        write_down_proj(reader, *solve(reader.weight.cpu(), measured, keep_H, ridge=ridge))
    return result
