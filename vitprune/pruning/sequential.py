r"""Compensation block by block, on the states that the already pruned blocks produce.

The hidden neurons h of block l are those of the dense weights on the *pruned* prefix. With kept neurons S, removed ones
P, mean μ and centred covariance C of h, and the drift e = dense residual stream after the block minus the one that the
unpruned block l makes of the pruned prefix,

.. math::
    B = C_{PS} (C_{SS} + \lambda I)^{-1}, \quad D = C_{eS} (C_{SS} + \kappa I)^{-1}, \quad W' = W_S + W_P B + D

and the bias takes up the means. The first term stands in for the removed neurons, the second steers the residual stream
back to the dense model's; calibration images are few and the drift is small, so κ is far larger than λ.

Letters: B images, N tokens, D embedding width, H hidden neurons, S kept.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.data import Batches, on_device
from vitprune.discovery.statistics import Statistics
from vitprune.errors import VitpruneError
from vitprune.feed_forward import FeedForward, hook_hidden
from vitprune.options import DEFAULT_DRIFT_RIDGE, DEFAULT_RIDGE
from vitprune.pruning.compensate import reconstruct, regress, write_down_proj
from vitprune.pruning.plan import Plan, fit_plan


@torch.no_grad()
def compensate_sequentially(
    model: nn.Module,
    plan: Plan,
    batches: Batches,
    *,
    towards_stream: bool,
    ridge: float = DEFAULT_RIDGE,
    drift_ridge: float = DEFAULT_DRIFT_RIDGE,
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
        ridge: λ relative to the mean variance of the hidden neurons; positive.
        drift_ridge: κ relative to the same; positive.
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
        sums = _DriftSums(gain_D)
        hidden: dict[str, Tensor] = {}
        with hook_hidden(work, [ffn], lambda _name, h, hidden=hidden: hidden.update(h=h)):
            for index, (dense_state, work_state) in enumerate(zip(dense_states, work_states, strict=True)):
                output = dense.run(dense_state.to(_device(model)))
                sums.add(hidden, output - pruned.run(work_state.to(_device(model))))
                dense_states[index] = output.to(dense_state.device)
        if not bool(plan.keep[ffn.name].all()) or towards_stream:
            statistics, drift_D, drift_DH = sums.finish()
            _solve(
                work.get_submodule(ffn.down_proj),
                plan.keep[ffn.name],
                statistics,
                (drift_D, drift_DH) if towards_stream else None,
                ridge,
                drift_ridge,
            )
        for index, work_state in enumerate(work_states):
            work_states[index] = pruned.run(work_state.to(_device(model))).to(work_state.device)
    return work


def _solve(down: nn.Linear, keep_H: Tensor, statistics: Statistics, drift, ridge: float, drift_ridge: float) -> None:
    weight_DH = down.weight.double().cpu()
    mean_H = statistics.mean_H
    map_PS = reconstruct(statistics, keep_H, ridge=ridge)
    kept_DS = weight_DH[:, keep_H] + weight_DH[:, ~keep_H] @ map_PS
    shift_D = weight_DH[:, ~keep_H] @ (mean_H[~keep_H] - map_PS @ mean_H[keep_H])
    if drift is not None:
        drift_D, drift_DH = drift
        steer_DS = regress(statistics, keep_H, drift_DH[:, keep_H].T, ridge=drift_ridge)
        kept_DS += steer_DS
        shift_D += drift_D - steer_DS @ mean_H[keep_H]
    solved_DH = torch.zeros_like(weight_DH)
    solved_DH[:, keep_H] = kept_DS
    write_down_proj(down, solved_DH, shift_D)


class _DriftSums:
    """Running sums of the hidden neurons and of the drift in units of the FFN's output, float64."""

    def __init__(self, gain_D: Tensor) -> None:
        # A channel that never reaches the residual stream cannot be steered.
        self.inverse_gain_D = torch.where(gain_D == 0, 0, 1 / gain_D).nan_to_num(posinf=0, neginf=0)
        self.count = 0
        self.shift_H: Tensor | None = None
        self.sums: list[Tensor] = []

    def add(self, hidden: dict[str, Tensor], drift: Tensor) -> None:
        rows_NH = hidden["h"].reshape(-1, hidden["h"].shape[-1])
        rows_NH = rows_NH.float() if rows_NH.dtype in (torch.float16, torch.bfloat16) else rows_NH
        drift_ND = drift.reshape(-1, drift.shape[-1]).to(rows_NH.dtype) * self.inverse_gain_D.to(rows_NH.dtype)
        if self.shift_H is None:
            self.shift_H = rows_NH.mean(0)
        rows_NH = rows_NH - self.shift_H
        parts = (rows_NH.sum(0), drift_ND.sum(0), rows_NH.T @ rows_NH, drift_ND.T @ rows_NH)
        if self.sums:
            for total, part in zip(self.sums, parts, strict=True):
                total += part
        else:
            self.sums = [part.double() for part in parts]
        self.count += len(rows_NH)

    def finish(self) -> tuple[Statistics, Tensor, Tensor]:
        """Return the statistics, the mean drift [D] and its covariance with the hidden neurons [D, H]."""
        offset_H, drift_D, square_HH, cross_DH = (total.div_(self.count).cpu() for total in self.sums)
        covariance_HH = square_HH.sub_(torch.outer(offset_H, offset_H))
        cross_DH = cross_DH.sub_(torch.outer(drift_D, offset_H))
        mean_H = self.shift_H.double().cpu() + offset_H
        statistics = Statistics(0, self.count, mean_H=mean_H, covariance_HH=covariance_HH)
        return statistics, drift_D, cross_DH


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
