r"""Compensation block by block, on the states that the already pruned blocks produce.

The hidden neurons h of block l are those of the dense weights on the *pruned* prefix. With kept neurons S, removed ones
P, mean μ and centred covariance C of h, and the drift e = dense residual stream after the block minus the one that the
unpruned block l makes of the pruned prefix,

.. math::
    B = C_{PS} (C_{SS} + \lambda I)^{-1}, \quad D = C_{eS} (C_{SS} + \kappa I)^{-1}, \quad W' = W_S + W_P B + D

and the bias takes up the means. The first term stands in for the removed neurons, the second steers the residual stream
back to the dense model's. The attention's output projection before it steers in the same way, by a D of its own on what
it reads, with e taken where the FFN reads the stream. All moments are weighted by token: half of the weight is spread
evenly, half follows the energy of the loss gradient at the FFN's output, so that in late blocks the class token counts
for as much as all patches. Drift is small and calibration images are few, so κ is chosen for each projection: the one
of a grid (infinity among them) that explains most of the drift on images it was not fitted to.

Letters: B images, N tokens, D embedding width, H hidden neurons, S kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.answer_loss import at_least_float32
from vitprune.calibration.moments import Moments
from vitprune.calibration.statistics import Statistics
from vitprune.data import Batches
from vitprune.entry import entry
from vitprune.models.block_calls import BlockCall, read_states_before, run_until_stopped, stopping_before, study_blocks
from vitprune.models.left_out import Bias, TokenMap
from vitprune.models.merging import MergingBlock, describe_merging, follow, pool, unmerged
from vitprune.models.units import find_groups
from vitprune.options import DEFAULT_RIDGE
from vitprune.progress import Track, untracked
from vitprune.pruning.compensate import reconstruct, regress, write_down_proj
from vitprune.pruning.plan import Plan, fit_plan
from vitprune.sharing import sharing, sum_of_all
from vitprune.views import num_patches, num_prefix_tokens

# Relative to the mean variance of the hidden neurons; infinity leaves the drift alone but for its mean, and comes
# first so that it wins where the images cannot tell.
DRIFT_RIDGES = (math.inf, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)


# Of a channel that steers, relative to the largest of its projection.
LEAST_GAIN = 1e-4


@entry
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
    calls: Mapping[str, BlockCall] | None = None,
    dense: nn.Module | None = None,
    track: Track = untracked,
) -> nn.Module:
    """Return a copy whose kept neurons, attention and biases stand in for the neurons that the plan removes.

    Shapes stay; the columns of removed neurons are zero. Over the images, each block runs three times and its attention
    a fourth time. Kept at once are two residual streams: 2 x images x tokens x embedding width numbers.

    Args:
        model: the dense model, or one whose attention is narrower already, which lacks layers or whose tokens merge.
        plan: which neurons of it stay.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels, which are
            not used. Readable more than once: for the first block, and twice for each later one that does not read
            what the block before it writes (the later stages of a Swin Transformer).
        towards_stream: aim at the dense residual stream, by FFN and attention; otherwise at what the unpruned FFN makes
            of the pruned prefix.
        weights: FFN name -> weight of each token [N], as ``weigh_tokens`` gives them; None: all the same.
        ridge: λ relative to the mean variance of the hidden neurons; positive.
        drift_ridges: values of κ to choose from, relative to the mean variance of what a projection reads; positive.
        calls: from ``study_blocks`` on the dense model, where it is there already.
        dense: the model whose answers are aimed at, of as many blocks; None: ``model``, unmerged. Where tokens of
            ``model`` have merged, the aim is the mean of the dense model's tokens that they stand for.
        track: wraps (FFNs, description), for progress.

    Raises:
        VitpruneError: if the plan is not for this model, ``batches`` is empty, or ``study_blocks`` refuses the model.

    Source:
        The statistics of the pruned prefix are those of sequential layer-wise reconstruction (Frantar and Alistarh,
        NeurIPS 2022, arXiv:2208.11580); steering towards the dense stream is the asymmetric target of Li et al.,
        arXiv:2504.02692 (GPTAQ), here with a regularisation of its own.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 4]))]
    >>> plan = Plan({f"blocks.{block}.mlp": torch.arange(768) < 384 for block in range(2)})
    >>> result = compensate_sequentially(model, plan, batches, towards_stream=True)
    >>> bool((result.blocks[1].mlp.fc2.weight[:, 384:] == 0).all())
    True
    """
    groups = {group.name: group for group in fit_plan(model, plan)}
    dense = unmerged(model) if dense is None else dense
    work = copy.deepcopy(model)
    if calls is None:
        calls = study_blocks(dense, find_groups(dense), batches)
    dense_states: list[Tensor] = []
    work_states: list[_State] = []
    for position, (name, call) in enumerate(track(list(calls.items()), "compensate")):
        weights_N = None if weights is None else weights[name]
        if not call.follows:
            dense_states, work_states = [], []
            dense_states = read_states_before(dense, call.name, batches)
            # Nothing is pruned before the first block.
            before = read_states_before(work, call.name, batches) if position else list(dense_states)
            work_states = [_State(state) for state in before]
        # Nothing has drifted before the first FFN of a model that is narrower there alone.
        if towards_stream and call.attention is not None and (position or dense is not model):
            _steer_attention(
                dense, work, call, dense_states, work_states, weights_N=weights_N, drift_ridges=drift_ridges
            )
        else:
            _run_in_place(call, dense, dense_states)
        _solve_ffn(
            work,
            call,
            name,
            plan.keep.get(name) if name in groups else None,
            dense_states,
            work_states,
            weights_N=weights_N,
            ridge=ridge,
            drift_ridges=drift_ridges if towards_stream else None,
        )
        for index, state in enumerate(work_states):
            work_states[index] = state.after(call, work)
    return work


@dataclass(frozen=True)
class _State:
    """The stream of a model whose tokens may merge.

    Attributes:
        x_BMD: tokens.
        size_BM1: how many patches each stands for; None where nothing has merged yet.
        source_BN: where each token of the dense stream is; None where nothing has merged yet.
    """

    x_BMD: Tensor
    size_BM1: Tensor | None = None
    source_BN: Tensor | None = None

    def after(self, call: BlockCall, model: nn.Module) -> _State:
        """Return the state behind a block of the model."""
        block = model.get_submodule(call.name)
        if not isinstance(block, MergingBlock):
            return _State(call.run(model, self.x_BMD))
        device = next(model.parameters()).device
        size_BM1 = None if self.size_BM1 is None else self.size_BM1.to(device)
        x_BMD, size_BM1, matching = block(self.x_BMD.to(device), size_BM1)
        source_BN = self.source_BN if matching is None else follow(matching, _on(self.source_BN, device))
        home = self.x_BMD.device
        return _State(x_BMD.to(home), _on(size_BM1, home), _on(source_BN, home))

    def pool(self, dense_BND: Tensor) -> Tensor:
        """Return what the dense stream has for these tokens [B, M, D]."""
        return dense_BND if self.source_BN is None else pool(self.source_BN, dense_BND, self.x_BMD.shape[1])

    def weigh(self, weights_N: Tensor | None) -> Tensor | None:
        """Return the weight of each token of each image [B, M]: a merged one counts for all that it stands for."""
        if weights_N is None:
            return None
        num_tokens = math.prod(self.x_BMD.shape[1:-1])  # some models have their tokens in a grid
        if len(weights_N) != num_tokens:
            # Weights of the tokens in front are one by one, those of all others alike.
            weights_N = torch.cat([weights_N, weights_N[-1:].expand(num_tokens)])[:num_tokens]
        weights_BM = weights_N.expand(len(self.x_BMD), -1)
        return weights_BM if self.size_BM1 is None else weights_BM * self.size_BM1[..., 0].to(weights_BM)


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _solve_ffn(
    work: nn.Module,
    call: BlockCall,
    name: str,
    keep_H: Tensor | None,
    dense_states: Sequence[Tensor],
    work_states: Sequence[_State],
    *,
    weights_N: Tensor | None,
    ridge: float,
    drift_ridges: Sequence[float] | None,
) -> None:
    """Change an FFN's output projection in ``work``, or what stands where the FFN was; dense states are those after."""
    module = work.get_submodule(name)
    if isinstance(module, Bias) and drift_ridges is None:
        return
    reader = None if isinstance(module, Bias) else module.proj if isinstance(module, TokenMap) else module.fc2
    seen: dict[str, Tensor] = {}
    halves = _Halves(call.gain_D)
    with ExitStack() as stack:
        # Of a bias, what it reads plays no part: one feature that is always zero.
        watched, index = (module, slice(0, 1)) if reader is None else (reader, slice(None))
        hook = lambda _module, inputs: seen.update(h=at_least_float32(inputs[0][..., index]))  # noqa: E731
        stack.callback(watched.register_forward_pre_hook(hook).remove)
        for dense_state, work_state in zip(dense_states, work_states, strict=True):
            after = work_state.after(call, work)
            halves.add(seen["h"], after.pool(dense_state) - after.x_BMD, after.weigh(weights_N))
    if reader is None:
        module.bias.add_(halves.mean_drift().to(module.bias))
    else:
        keep_H = torch.ones(reader.in_features, dtype=torch.bool) if keep_H is None else keep_H
        if drift_ridges is not None or not bool(keep_H.all()):
            _solve(reader, keep_H, halves, ridge, drift_ridges)


def _run_in_place(call: BlockCall, model: nn.Module, states: list[Tensor]) -> None:
    # A new list would keep a third residual stream beside the two.
    for index, state in enumerate(states):
        states[index] = call.run(model, state)


def _steer_attention(
    dense: nn.Module,
    work: nn.Module,
    call: BlockCall,
    dense_states: list[Tensor],
    work_states: Sequence[_State],
    *,
    weights_N: Tensor | None,
    drift_ridges: Sequence[float],
) -> None:
    """Change the attention's output projection in ``work``; the dense states become those after the block."""
    attention = call.attention
    # A bias that stands where attention was has nothing to steer with: the FFN behind it does it.
    proj = getattr(work.get_submodule(attention.proj.rpartition(".")[0]), "proj", None)
    if proj is None:
        _run_in_place(call, dense, dense_states)
        return
    halves = _Halves(attention.gain_D)
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        dense_reader = dense.get_submodule(attention.reader)
        for module, name in ((dense_reader, "wanted"), (proj, "rows")):
            hook = lambda _module, inputs, name=name: seen.update({name: inputs[0]})  # noqa: E731
            stack.callback(module.register_forward_pre_hook(hook).remove)
        # Tokens of this block merge behind its attention, before anything else reads the stream.
        reader = getattr(work.get_submodule(call.name), "merge", None) or work.get_submodule(attention.reader)
        stop = stopping_before(reader, lambda stream: seen.update(got=stream))
        stack.enter_context(stop)
        for index, work_state in enumerate(work_states):
            dense_states[index] = call.run(dense, dense_states[index])
            run_until_stopped(work_state.after, call, work)
            wanted = work_state.pool(seen["wanted"].to(work_state.x_BMD.device))
            halves.add(at_least_float32(seen["rows"]), wanted - seen["got"].to(wanted), work_state.weigh(weights_N))
    every = torch.ones(proj.in_features, dtype=torch.bool)
    _solve(proj, every, halves, None, drift_ridges)


def weigh_tokens(model: nn.Module, statistics: Mapping[str, Statistics]) -> dict[str, Tensor]:
    """Weigh every token by how much the loss depends on what an FFN writes there.

    Args:
        model: whose prefix tokens (class, distillation, registers) are weighed one by one and whose others alike.
        statistics: of its FFNs, with ``gradients``.

    Returns:
        FFN name -> weights [N]; float64, mean 1, each at least 0.5.
    """
    patches = num_patches(model)
    weights = {}
    for name, of_ffn in statistics.items():
        energy_N = of_ffn.energy_N.clone()
        # Some models add their class token only after these blocks: count what the FFN sees.
        num_prefix = len(energy_N) - patches if patches is not None else 0
        if describe_merging(model) is not None:
            num_prefix = num_prefix_tokens(model)
        elif num_prefix != num_prefix_tokens(model):
            num_prefix = 0
        energy_N[num_prefix:] = energy_N[num_prefix:].mean()
        mean = energy_N.mean()
        weights[name] = 0.5 + 0.5 * energy_N / mean if mean > 0 else torch.ones_like(energy_N)
    return weights


def _solve(
    down: nn.Linear, keep_H: Tensor, halves: _Halves, ridge: float | None, drift_ridges: Sequence[float] | None
) -> None:
    """Write an output projection; ``ridge`` where inputs go, ``drift_ridges`` where it shall steer."""
    even, odd = (half.of_all() for half in halves.moments)
    whole = even.merge(odd).finish()
    weight_DH, mean_H = down.weight.double().cpu(), whole.hidden.mean_H
    kept_DS = weight_DH[:, keep_H].clone()
    shift_D = torch.zeros_like(weight_DH[:, 0])
    if not bool(keep_H.all()):
        map_PS = reconstruct(whole.hidden, keep_H, ridge=ridge)
        kept_DS += weight_DH[:, ~keep_H] @ map_PS
        shift_D += weight_DH[:, ~keep_H] @ (mean_H[~keep_H] - map_PS @ mean_H[keep_H])
    if drift_ridges is not None:
        shift_D += whole.drift_D
        finished = [half.finish() for half in (even, odd)]
        penalty = _choose_ridge(keep_H, halves.gain_D.cpu(), finished, drift_ridges)
        if math.isfinite(penalty):
            steer_DS = regress(whole.hidden, keep_H, whole.drift_DH[:, keep_H].T, ridge=penalty)
            kept_DS += steer_DS
            shift_D -= steer_DS @ mean_H[keep_H]
    solved_DH = torch.zeros_like(weight_DH)
    solved_DH[:, keep_H] = kept_DS
    write_down_proj(down, solved_DH, shift_D)


def _choose_ridge(keep_H: Tensor, gain_D: Tensor, halves: Sequence[_Drift], drift_ridges: Sequence[float]) -> float:
    """Return the κ whose D, fitted on one half of the images, leaves least of the other half's drift; both ways.

    What is left is counted in the residual stream, where the FFN's output arrives times its gain. Of equals, the first.
    """
    left = dict.fromkeys(drift_ridges, 0.0)
    for fitted, tested in (halves, halves[::-1]):
        scale = float(fitted.hidden.covariance_HH.diagonal().mean())
        values_S, vectors_SS = torch.linalg.eigh(fitted.hidden.covariance_HH[keep_H][:, keep_H])
        along_SD = vectors_SS.T @ fitted.drift_DH[:, keep_H].T
        cross_SD = vectors_SS.T @ tested.drift_DH[:, keep_H].T
        kept_SS = vectors_SS.T @ tested.hidden.covariance_HH[keep_H][:, keep_H] @ vectors_SS
        for penalty in filter(math.isfinite, drift_ridges):
            damping = max(penalty * scale, torch.finfo(torch.float64).tiny)
            steer_SD = along_SD / (values_S.clamp_min(0) + damping).unsqueeze(1)
            # |e - D h|² on the other half, less the part that is the same for all: |e|².
            left_D = (steer_SD * (kept_SS @ steer_SD - 2 * cross_SD)).sum(0)
            left[penalty] += float((left_D * gain_D.square()).sum())
    return min(left, key=left.get)


@dataclass(frozen=True)
class _Drift:
    """Moments of what a projection reads, the mean drift and its covariance with it; float64, on the CPU."""

    hidden: Statistics
    drift_D: Tensor
    drift_DH: Tensor


class _Halves:
    """Moments of even images and of odd images: neighbours in a class folder fall into both halves."""

    def __init__(self, gain_D: Tensor) -> None:
        self.gain_D = gain_D
        self.moments: tuple[_DriftMoments, ...] = ()
        self.num_images = 0

    def add(self, hidden: Tensor, drift: Tensor, weights_BN: Tensor | None) -> None:
        """Add what the projection reads [B, ..., H], the drift of the residual stream [B, ..., D], and weights."""
        if not self.moments:
            shift_H = hidden.flatten(0, -2).mean(0)
            self.moments = tuple(_DriftMoments(self.gain_D, shift_H) for _ in range(2))
        for parity, half in enumerate(self.moments):
            chosen = _of_parity(parity, self.num_images)
            weights = None if weights_BN is None else weights_BN[chosen].to(half.hidden.shift_H)
            half.add(hidden[chosen], drift[chosen].to(half.hidden.shift_H), weights)
        self.num_images += len(drift)

    def mean_drift(self) -> Tensor:
        """Return the mean drift of all images in units of the projection's output [D], float64."""
        even, odd = (half.of_all() for half in self.moments)
        return even.merge(odd).finish().drift_D


def _of_parity(parity: int, before: int) -> slice:
    """Return which images of a batch have an even (0) or odd (1) place among all, ``before`` of this process's gone."""
    here = sharing()
    if here.count % 2 == 0:
        return slice(None) if here.rank % 2 == parity else slice(0, 0)
    return slice((parity + here.rank + before) % 2, None, 2)


class _DriftMoments:
    """Moments of what a projection reads, of the drift in units of the projection's output, and of both together.

    Halves of the same images share a shift, so merging them is adding.
    """

    def __init__(self, gain_D: Tensor, shift_H: Tensor) -> None:
        self.gain_D = gain_D
        # A channel that hardly reaches the residual stream would need weights beyond what half precision holds.
        reaches_D = gain_D.abs() > LEAST_GAIN * gain_D.abs().max()
        self.inverse_gain_D = torch.where(reaches_D, 1 / gain_D, 0).to(shift_H)
        self.hidden = Moments(shift_H)
        self.drift_D: Tensor | float = 0.0
        self.drift_DH: Tensor | float = 0.0

    def add(self, hidden: Tensor, drift: Tensor, weights_BN: Tensor | None) -> None:
        """Add hidden neurons [B, ..., H] and the drift of the residual stream [B, ..., D], by weight of the token."""
        rows_NH = hidden.reshape(-1, hidden.shape[-1])
        drift_ND = drift.reshape(-1, drift.shape[-1]) * self.inverse_gain_D
        weights_N1 = rows_NH.new_ones(len(rows_NH), 1)
        if weights_BN is not None:
            weights_N1 = weights_BN.reshape(-1, 1)
        self.hidden.add(rows_NH, weights_N1)
        weighted_ND = weights_N1 * drift_ND
        self.drift_D = self.drift_D + weighted_ND.sum(0).double()
        self.drift_DH = self.drift_DH + (weighted_ND.T @ (rows_NH - self.hidden.shift_H)).double()

    def merge(self, other: _DriftMoments) -> _DriftMoments:
        """Return the moments of the images of both."""
        merged = _DriftMoments(self.gain_D, self.hidden.shift_H)
        merged.hidden = self.hidden.merge(other.hidden)
        merged.drift_D, merged.drift_DH = self.drift_D + other.drift_D, self.drift_DH + other.drift_DH
        return merged

    def of_all(self) -> _DriftMoments:
        """Return the moments of all processes that share images; this one stays as it is."""
        if sharing().count == 1:
            return self
        total = _DriftMoments(self.gain_D, self.hidden.shift_H)
        total.hidden = self.hidden.of_all()
        step_H = self.hidden.shift_H.double() - total.hidden.shift_H.double()
        moved_DH = self.drift_DH + torch.outer(self.drift_D, step_H)
        total.drift_D, total.drift_DH = sum_of_all(self.drift_D, moved_DH)
        return total

    def finish(self) -> _Drift:
        """Return what they come to; the products are used up."""
        count = max(self.hidden.count, 1.0)
        offset_H, drift_D = ((total / count).cpu() for total in (self.hidden.sum_H, self.drift_D))
        num_tokens = round(self.hidden.count)
        hidden = Statistics(0, num_tokens, *self.hidden.finish())
        return _Drift(hidden, drift_D, (self.drift_DH / count).cpu().sub_(torch.outer(drift_D, offset_H)))
