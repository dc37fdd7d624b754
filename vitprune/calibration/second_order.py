r"""Second-order selection: remove, one after another, the neuron whose loss the others can make good best.

For an FFN with output projection W, centred covariance C of its hidden neurons and G = E[g gᵀ], g the gradient of the
loss at the FFN's output, the loss that removing neuron i costs after all kept neurons were refitted is

.. math:: c_i = \tfrac12 \, \frac{\| A_{:,i} \|^2}{[(C + \lambda I)^{-1}]_{ii}}, \qquad A = G^{1/2} W

The expectation is over labels drawn from the model's own answer, so G is the true Fisher information and no labels are
needed. Costs are in nats per image whatever the FFN, so one ranking serves them all.

Letters: N tokens, D embedding width, H hidden neurons.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitprune.calibration.statistics import Statistics
from vitprune.models.units import find_groups
from vitprune.options import DEFAULT_RIDGE
from vitprune.progress import Track, untracked

# Removals between two full updates of the inverse: matrix products instead of one rank-1 update per neuron.
BLOCK = 64


def obs(
    model: nn.Module,
    statistics: Mapping[str, Statistics],
    *,
    ridge: float = DEFAULT_RIDGE,
    track: Track = untracked,
) -> dict[str, Tensor]:
    """Rank neurons by the loss that their removal costs after compensation, eliminating them one by one.

    Args:
        model: timm Vision Transformer.
        statistics: of its FFNs, with ``moments`` and ``gradients``.
        ridge: λ relative to the mean variance of the hidden neurons, as in the compensation that follows; positive.
        track: wraps (FFNs, description), for progress: an FFN of 4,096 neurons takes many seconds.

    Returns:
        FFN name -> scores [H]; float64, nats per image, positive; the neuron eliminated last has the highest. A score
        is the largest cost met until the neuron went, so scores order neurons as the elimination did.

    Source:
        Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992, with the
        layer-wise Kronecker form of the Fisher information (arXiv:1503.05671).
    """
    scores = {}
    for group in track(find_groups(model), "rank neurons"):
        of_group = statistics[group.name]
        values, vectors = torch.linalg.eigh(of_group.gradient_DD)
        root_DD = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        weight_DH = model.get_submodule(group.read_by).weight.detach().double().cpu()
        scores[group.name] = _as_scores(*eliminate(root_DD @ weight_DH, of_group.covariance_HH, ridge=ridge))
    return scores


def eliminate(a_DH: Tensor, covariance_HH: Tensor, *, ridge: float = DEFAULT_RIDGE) -> tuple[Tensor, Tensor]:
    """Remove the neuron of least cost, refit the others, and repeat until none is left.

    Args:
        a_DH: output projection in units of the square root of the loss; float64.
        covariance_HH: of the hidden neurons; float64.
        ridge: λ relative to the mean variance; positive.

    Returns:
        The order of removal (int64 [H]) and the cost of each removal [H] (float64).
    """
    num_neurons = len(covariance_HH)
    damping = max(ridge * float(covariance_HH.diagonal().mean()), torch.finfo(torch.float64).tiny)
    damped_HH = covariance_HH.clone()
    damped_HH.diagonal().add_(damping)
    inverse_HH = torch.linalg.inv(damped_HH)
    inverse_HH = (inverse_HH + inverse_HH.T) / 2
    a_DH = a_DH.clone()
    alive = torch.arange(num_neurons)
    order, costs = [], []
    while len(alive):
        # Within a block, removals are kept as factors: inverse = inverse_HH - U Uᵀ, a = a_DH - V Uᵀ.
        steps = min(BLOCK, len(alive))
        u_HS, v_DS = inverse_HH.new_zeros(len(alive), steps), a_DH.new_zeros(len(a_DH), steps)
        diagonal_H, square_H = inverse_HH.diagonal().clone(), a_DH.square().sum(0)
        gone_H = torch.zeros(len(alive), dtype=torch.bool)
        for step in range(steps):
            cost_H = (square_H / diagonal_H).masked_fill(gone_H, torch.inf)
            best = int(cost_H.argmin())
            order.append(int(alive[best]))
            costs.append(0.5 * float(cost_H[best]))
            row_H = inverse_HH[best] - u_HS[:, :step] @ u_HS[best, :step]
            column_D = a_DH[:, best] - v_DS[:, :step] @ u_HS[best, :step]
            pivot = row_H[best].sqrt()
            u_HS[:, step], v_DS[:, step] = row_H / pivot, column_D / pivot
            # a'ᵢ = aᵢ - v uᵢ, so |a'ᵢ|² = |aᵢ|² - 2 uᵢ (aᵢ·v) + uᵢ² |v|², with aᵢ as it is before this step.
            v_D, u_H = v_DS[:, step], u_HS[:, step]
            along_H = a_DH.T @ v_D - u_HS[:, :step] @ (v_DS[:, :step].T @ v_D)
            square_H = (square_H - 2 * u_H * along_H + u_H.square() * v_D.square().sum()).clamp_min(0)
            diagonal_H = (diagonal_H - u_H.square()).clamp_min(torch.finfo(torch.float64).tiny)
            gone_H[best] = True
        stay = ~gone_H
        inverse_HH = (inverse_HH - u_HS @ u_HS.T)[stay][:, stay]
        a_DH = (a_DH - v_DS @ u_HS.T)[:, stay]
        alive = alive[stay]
    return torch.tensor(order), torch.tensor(costs, dtype=torch.float64)


def _as_scores(order_H: Tensor, costs_H: Tensor) -> Tensor:
    """Turn an elimination into scores that rise along it: the running maximum, made strict by one part in 10^12."""
    scores_H = torch.empty_like(costs_H)
    highest = torch.finfo(torch.float64).tiny
    for neuron, cost in zip(order_H.tolist(), costs_H.tolist(), strict=True):
        highest = max(highest * (1 + 1e-12), cost)
        scores_H[neuron] = highest
    return scores_H
