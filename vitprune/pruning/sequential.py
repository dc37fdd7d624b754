r"""Compensation block by block, on the states that the already pruned blocks produce.

The hidden neurons h of block l are those of the dense weights on the *pruned* prefix. With kept neurons S, removed ones
P, mean μ and centred covariance C of h, and the drift e = dense residual stream after the block minus the one that the
unpruned block l makes of the pruned prefix,

.. math::
    B = C_{PS} (C_{SS} + \lambda I)^{-1}, \quad D = C_{eS} (C_{SS} + \kappa I)^{-1}, \quad W' = W_S + W_P B + D

and the bias takes up the means. The first term stands in for the removed neurons, the second steers the residual stream
back to the dense model's. All moments are weighted by token: half of the weight is spread evenly, half follows the
energy of the loss gradient at the FFN's output, so that in late blocks the class token counts for as much as all
patches. Drift is small and calibration images are few, so κ is chosen for each block: the one of a
grid (infinity among them) that explains most of the drift on images it was not fitted to.

Letters: B images, N tokens, D embedding width, H hidden neurons, S kept.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.data import Batches, on_device
from vitprune.discovery.statistics import Statistics
from vitprune.errors import VitpruneError
from vitprune.feed_forward import FeedForward, hook_hidden
from vitprune.options import DEFAULT_RIDGE
from vitprune.pruning.compensate import reconstruct, regress, write_down_proj
from vitprune.pruning.plan import Plan, fit_plan

# Relative to the mean variance of the hidden neurons; infinity leaves the drift alone but for its mean.
DRIFT_RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, math.inf)


@torch.no_grad()
def compensate_sequentially(
    model: nn.Module,
    plan: Plan,
    batches: Batches,
    *,
    towards_stream: bool,
    weights: Mapping[str, Tensor] | None = None,
    ridge: float = DEFAULT_RIDGE,
    drift_ridges: Sequence[float] = DRIFT_RIDGES,
    track: Callable[[list[FeedForward]], Any] = iter,
) -> nn.Module:
    """Return a copy whose kept neurons and biases stand in for the ones that the plan removes.

    Shapes stay; the columns of removed neurons are zero. Each block runs three times over the images. Kept at once are
    two residual streams: 2 x images x tokens x embedding width numbers.

    Args:
        model: the dense model.
        plan: which neurons stay.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels, which are
            not used. Read once where each block reads what the block before it writes, and once more for each block
            that does not (the stages of a Swin Transformer).
        towards_stream: aim at the dense residual stream; otherwise at what the unpruned FFN makes of the pruned prefix.
        weights: FFN name -> weight of each token [N], as ``weigh_tokens`` gives them; None: all the same.
        ridge: λ relative to the mean variance of the hidden neurons; positive.
        drift_ridges: values of κ to choose from, relative to the same; positive.
        track: wraps the list of FFNs, for progress.

    Raises:
        VitpruneError: if the plan is not for this model, ``batches`` is empty, or a block does not add its FFN's output
            to the residual stream.

    Source:
        The statistics of the pruned prefix are those of sequential layer-wise reconstruction (Frantar and Alistarh,
        NeurIPS 2022, arXiv:2208.11580); steering towards the dense stream is the asymmetric target of Li et al.,
        arXiv:2504.02692 (GPTAQ), here with a regularisation of its own.
    """
    ffns = fit_plan(model, plan)
    blocks = {ffn.name: _block_of(ffn) for ffn in ffns}
    work = copy.deepcopy(model)
    followed, extras = _probe(model, list(blocks.values()), batches)
    dense_states: list[Tensor] = []
    work_states: list[Tensor] = []
    for ffn in track(ffns):
        name = blocks[ffn.name]
        dense, pruned = (_Block(each.get_submodule(name), *extras[name]) for each in (model, work))
        if not followed[name]:
            dense_states, work_states = _states_before(model, name, batches), _states_before(work, name, batches)
        gain_D = _measure_gain(dense, ffn.down_proj.removeprefix(f"{name}."), dense_states[0][:1].to(_device(model)))
        halves: tuple[_DriftSums, ...] = ()
        seen = 0
        hidden: dict[str, Tensor] = {}
        with hook_hidden(work, [ffn], lambda _name, h, hidden=hidden: hidden.update(h=h)):
            for index, (dense_state, work_state) in enumerate(zip(dense_states, work_states, strict=True)):
                output = dense.run(dense_state.to(_device(model)))
                drift = output - pruned.run(work_state.to(_device(model)))
                # Even images and odd images: neighbours in a class folder fall into both halves.
                if not halves:
                    shift_H = hidden["h"].flatten(0, -2).mean(0)
                    weights_N = None if weights is None else weights[ffn.name].to(shift_H)
                    halves = (_DriftSums(gain_D, shift_H, weights_N), _DriftSums(gain_D, shift_H, weights_N))
                for parity, sums in enumerate(halves):
                    sums.add(hidden["h"][(parity + seen) % 2 :: 2], drift[(parity + seen) % 2 :: 2])
                seen += len(drift)
                dense_states[index] = output.to(dense_state.device)
        if not bool(plan.keep[ffn.name].all()) or towards_stream:
            penalties = drift_ridges if towards_stream else None
            _solve(work.get_submodule(ffn.down_proj), plan.keep[ffn.name], halves, ridge, penalties)
        for index, work_state in enumerate(work_states):
            work_states[index] = pruned.run(work_state.to(_device(model))).to(work_state.device)
    return work


def weigh_tokens(model: nn.Module, statistics: Mapping[str, Statistics]) -> dict[str, Tensor]:
    """Weigh every token by how much the loss depends on what an FFN writes there.

    Args:
        model: whose prefix tokens (class, distillation, registers) are weighed one by one and whose others alike.
        statistics: of its FFNs, with ``gradients``.

    Returns:
        FFN name -> weights [N]; float64, mean 1, each at least 0.5.
    """
    num_prefix = getattr(model, "num_prefix_tokens", 0)
    weights = {}
    for name, of_ffn in statistics.items():
        energy_N = of_ffn.energy_N.clone()
        if num_prefix < len(energy_N):
            energy_N[num_prefix:] = energy_N[num_prefix:].mean()
        mean = energy_N.mean()
        weights[name] = 0.5 + 0.5 * energy_N / mean if mean > 0 else torch.ones_like(energy_N)
    return weights


def _solve(down: nn.Linear, keep_H: Tensor, halves, ridge: float, drift_ridges: Sequence[float] | None) -> None:
    even, odd = halves
    whole = _finish([left + right for left, right in zip(even.sums, odd.sums, strict=True)], even.shift_H)
    weight_DH, mean_H = down.weight.double().cpu(), whole.mean_H
    map_PS = reconstruct(whole, keep_H, ridge=ridge)
    kept_DS = weight_DH[:, keep_H] + weight_DH[:, ~keep_H] @ map_PS
    shift_D = weight_DH[:, ~keep_H] @ (mean_H[~keep_H] - map_PS @ mean_H[keep_H])
    if drift_ridges is not None:
        shift_D += whole.drift_D
        penalty = _choose_ridge(keep_H, [_finish(half.sums, half.shift_H) for half in halves], drift_ridges)
        if math.isfinite(penalty):
            steer_DS = regress(whole, keep_H, whole.drift_DH[:, keep_H].T, ridge=penalty)
            kept_DS += steer_DS
            shift_D -= steer_DS @ mean_H[keep_H]
    solved_DH = torch.zeros_like(weight_DH)
    solved_DH[:, keep_H] = kept_DS
    write_down_proj(down, solved_DH, shift_D)


def _choose_ridge(keep_H: Tensor, halves: Sequence[_Drift], drift_ridges: Sequence[float]) -> float:
    """Return the κ whose D, fitted on one half of the images, leaves least of the other half's drift; both ways."""
    left = dict.fromkeys(drift_ridges, 0.0)
    for fitted, tested in (halves, halves[::-1]):
        scale = float(fitted.covariance_HH.diagonal().mean())
        values_S, vectors_SS = torch.linalg.eigh(fitted.covariance_HH[keep_H][:, keep_H])
        along_SD = vectors_SS.T @ fitted.drift_DH[:, keep_H].T
        cross_SD = vectors_SS.T @ tested.drift_DH[:, keep_H].T
        kept_SS = vectors_SS.T @ tested.covariance_HH[keep_H][:, keep_H] @ vectors_SS
        for penalty in drift_ridges:
            damping = max(penalty * scale, torch.finfo(torch.float64).tiny)
            steer_SD = along_SD / (values_S.clamp_min(0) + damping).unsqueeze(1)
            # |e - D h|² on the other half, less the part that is the same for all: |e|².
            left[penalty] += float((steer_SD * (kept_SS @ steer_SD - 2 * cross_SD)).sum())
    return min(left, key=left.get)


@dataclass(frozen=True)
class _Drift(Statistics):
    """Statistics of the hidden neurons, the mean drift and its covariance with them; float64."""

    drift_D: Tensor | None = None
    drift_DH: Tensor | None = None


class _DriftSums:
    """Running sums of hidden neurons (around a shift), of the drift in units of the FFN's output, and of products.

    Products are taken in the model's dtype, sums in float64.
    """

    def __init__(self, gain_D: Tensor, shift_H: Tensor, weights_N: Tensor | None = None) -> None:
        self.shift_H, self.weights_N = shift_H, weights_N
        # A channel that never reaches the residual stream cannot be steered.
        self.inverse_gain_D = torch.where(gain_D == 0, 0, 1 / gain_D)
        self.sums: list[Tensor] = []

    def add(self, hidden: Tensor, drift: Tensor) -> None:
        hidden = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
        rows_NH = hidden.reshape(-1, hidden.shape[-1]) - self.shift_H.to(hidden.dtype)
        drift_ND = drift.reshape(-1, drift.shape[-1]).to(rows_NH.dtype) * self.inverse_gain_D.to(rows_NH.dtype)
        weights_N1 = torch.ones(len(rows_NH), 1).to(rows_NH)
        if self.weights_N is not None:
            weights_N1 = self.weights_N.to(rows_NH.dtype).repeat(len(hidden)).unsqueeze(1)
        weighted_NH, weighted_ND = weights_N1 * rows_NH, weights_N1 * drift_ND
        parts = [
            weights_N1.sum(),
            weighted_NH.sum(0),
            weighted_ND.sum(0),
            weighted_NH.T @ rows_NH,
            weighted_ND.T @ rows_NH,
        ]
        parts = [part.double() for part in parts]
        self.sums = [total.add_(part) for total, part in zip(self.sums, parts, strict=True)] if self.sums else parts


def _finish(sums: Sequence[Tensor], shift_H: Tensor) -> _Drift:
    count = max(float(sums[0]), 1.0)
    offset_H, drift_D, square_HH, cross_DH = ((total / count).cpu() for total in sums[1:])
    return _Drift(
        num_images=0,
        num_tokens=int(sums[0]),
        mean_H=shift_H.double().cpu() + offset_H,
        covariance_HH=square_HH.sub_(torch.outer(offset_H, offset_H)),
        drift_D=drift_D,
        drift_DH=cross_DH.sub_(torch.outer(drift_D, offset_H)),
    )


# --- running one block at a time -------------------------------------------------------------------------------------


class _Block:
    """A block with the arguments it is called with beside the states."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs

    def run(self, states: Tensor) -> Tensor:
        return self.module(states, *self.args, **self.kwargs)


def _block_of(ffn: FeedForward) -> str:
    if ".ffns." in ffn.name:
        raise VitpruneError(f"{ffn.name}: sequential compensation needs one FFN per block; use ridge")
    return re.sub(r"\.mlp$", "", ffn.name)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _probe(model: nn.Module, blocks: list[str], batches: Batches) -> tuple[dict[str, bool], dict[str, tuple]]:
    """Tell which blocks read exactly what the block before wrote, and what else each is called with."""
    images = next((images for images, _labels in on_device(model, batches)), None)
    if images is None:
        raise VitpruneError("no calibration images")
    one, two = (_record_calls(model, blocks, images[:1].expand(count, -1, -1, -1)) for count in (1, 2))
    followed, extras, previous = {}, {}, None
    for name in blocks:
        args, kwargs, output = two[name]
        shapes = [
            [tuple(v.shape) for v in (*a[1:], *k.values()) if isinstance(v, Tensor)]
            for a, k, _ in (one[name], two[name])
        ]
        if shapes[0] != shapes[1]:
            raise VitpruneError(f"{name} is called with more than its states for each image; use ridge compensation")
        followed[name] = previous is not None and args[0].shape == previous.shape and torch.equal(args[0], previous)
        extras[name] = (args[1:], kwargs)
        previous = output
    return followed, extras


def _record_calls(model: nn.Module, blocks: list[str], images: Tensor) -> dict[str, tuple]:
    calls: dict[str, tuple] = {}
    handles = []
    try:
        for name in blocks:
            hook = lambda _module, args, kwargs, output, name=name: calls.update({name: (args, kwargs, output)})  # noqa: E731
            handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


class _Stop(Exception):
    pass


@contextmanager
def _stopping_before(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    def stop(_module: nn.Module, args: tuple) -> None:
        seen.append(args[0])
        raise _Stop

    handle = module.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _states_before(model: nn.Module, block: str, batches: Batches) -> list[Tensor]:
    seen: list[Tensor] = []
    with _stopping_before(model.get_submodule(block), seen):
        for images, _labels in on_device(model, batches):
            try:
                model(images)
            except _Stop:
                seen[-1] = seen[-1].cpu()
    return seen


def _measure_gain(block: _Block, down_name: str, states: Tensor) -> Tensor:
    """Return how much of the FFN's output reaches the residual stream, by channel [D] (LayerScale; ones without)."""

    def widen(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    module = copy.deepcopy(block.module).double()
    args, kwargs = tuple(map(widen, block.args)), {key: widen(value) for key, value in block.kwargs.items()}
    added: Tensor | float = 0.0
    module.get_submodule(down_name).register_forward_hook(lambda _module, _inputs, output: output + added)
    base = module(states.double(), *args, **kwargs)
    added = 1.0
    gain_D = (module(states.double(), *args, **kwargs) - base).flatten(0, -2).mean(0)
    added = torch.randn(gain_D.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(gain_D.device)
    seen = module(states.double(), *args, **kwargs) - base
    if not torch.allclose(seen, (gain_D * added).expand_as(seen), rtol=1e-4, atol=1e-9):
        raise VitpruneError(
            f"a {type(module).__name__} does not add its FFN's output to the residual stream (it is normalised first); "
            "use ridge compensation"
        )
    return gain_D
