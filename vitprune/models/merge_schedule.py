"""How many tokens merge in which block: written by a user, or chosen by what it costs the model's answers.

Few merges of many tokens cost about what many of few do, and run faster.

Letters: B images, N tokens, C classes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitprune.answer_loss import answer_loss
from vitprune.answers import ask, check_one_class
from vitprune.data import Batches, on_device
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.attention import SplitAttention, split_attention
from vitprune.models.macs import count_macs
from vitprune.models.merging import check_merging, check_schedule, describe_merging, set_merging
from vitprune.models.trunk import plain_attention
from vitprune.progress import Track, untracked
from vitprune.sharing import mean_of_all
from vitprune.views import num_patches, num_prefix_tokens

_FORMS = "'constant:13', 'every3:39', '3:60,6:60,9:36' (block:tokens) or a number for each block"


@entry
def parse_schedule(text: str, model: nn.Module) -> tuple[int, ...]:
    """Read how many tokens disappear in each block.

    Args:
        text: ``constant:R`` for R in every block, ``everyK:R`` for R in blocks 0, K, 2K, ...: R or as many as can;
            ``3:60,6:60`` for some blocks; or ``0,0,0,60,...``, a number for each block.
        model: whose schedule it is to be.

    Raises:
        VitpruneError: if the text is none of these, names a block twice or one that is not there, or more than half
            of the patches of a block are to go at once.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=4)
    >>> parse_schedule("every3:39", model), parse_schedule("2:60", model)
    ((39, 0, 0, 39), (0, 0, 60, 0))
    """
    num_blocks = len(model.blocks)
    everywhere = re.fullmatch(r"(constant|every([1-9]\d*)):(\d+)", text)
    if everywhere:
        step, r = int(everywhere[2] or 1), int(everywhere[3])
        return _clamped(model, [0 if index % step else r for index in range(num_blocks)])
    if re.fullmatch(r"\d+:\d+(,\d+:\d+)*", text):
        pairs = [tuple(map(int, pair.split(":"))) for pair in text.split(",")]
        blocks = [block for block, _r in pairs]
        missing = [block for block in blocks if block >= num_blocks]
        if missing:
            raise VitpruneError(f"merging '{text}': there is no block {missing[0]}, the model has {num_blocks}")
        if len(set(blocks)) < len(blocks):
            raise VitpruneError(f"merging '{text}': a block is named twice")
        schedule = tuple(dict(pairs).get(index, 0) for index in range(num_blocks))
    elif re.fullmatch(r"\d+(,\d+)*", text):
        schedule = tuple(map(int, text.split(",")))
    else:
        raise VitpruneError(f"merging '{text}': expected {_FORMS}")
    check_schedule(model, schedule)
    return schedule


def _clamped(model: nn.Module, schedule: Sequence[int]) -> tuple[int, ...]:
    """Return a schedule that takes what it says, or as many as can go."""
    left, result = num_patches(model), []
    for r in schedule:
        result.append(min(r, left // 2))
        left -= result[-1]
    return tuple(result)


# Merges that are looked at before more of them.
FEW_MERGES = 3
# Block -> how many tokens merge there, beside the other blocks.
_Shape = dict[int, float]
# Schedule -> what it leaves, as a share of what the model costs without merging.
ShareOf = Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class _BlockCost:
    """Multiply-accumulates of one block.

    Attributes:
        linear: of attention, per token.
        quadratic: of attention, per pair of tokens.
        ffn: per token.
        compared: width of the keys of all heads; None where no token can merge.
    """

    linear: float
    quadratic: float
    ffn: float
    compared: int | None


@dataclass(frozen=True)
class _Costs:
    """What a schedule costs.

    Attributes:
        dense: multiply-accumulates without merging.
        blocks: of each block.
        num_prefix: tokens before the patches.
        num_patches: of an image.
        width: D.
    """

    dense: int
    blocks: tuple[_BlockCost, ...]
    num_prefix: int
    num_patches: int
    width: int

    def share(self, schedule: Sequence[int]) -> float:
        """Return the multiply-accumulates of a schedule as a share of those without merging."""
        return 1 + (self._of_blocks(schedule) - self._of_blocks([0] * len(schedule))) / self.dense

    def _of_blocks(self, schedule: Sequence[int]) -> float:
        total, left = 0.0, self.num_prefix + self.num_patches
        for block, r in zip(self.blocks, schedule, strict=True):
            total += block.linear * left + block.quadratic * left**2
            if r:
                second = (left - self.num_prefix) // 2
                total += (left - self.num_prefix - second) * second * block.compared
                total += (left - r) * left * (self.width + 1)
            left -= r
            total += block.ffn * left
        return total

    def fit(self, shape: _Shape, share: float, share_of: ShareOf | None = None) -> tuple[int, ...] | None:
        """Return the smallest schedule of a shape that meets a share; None where there is none."""
        if any(self.blocks[block].compared is None for block in shape):
            return None
        share_of = share_of or self.share
        for scale in range(1, self.num_patches + 1):
            left, schedule = self.num_patches, [0] * len(self.blocks)
            for block, weight in shape.items():
                schedule[block] = min(round(scale * weight), left // 2)
                left -= schedule[block]
            if share_of(schedule) <= share:
                return tuple(schedule)
        return None


@entry
@torch.no_grad()
def choose_schedule(
    model: nn.Module,
    batches: Batches,
    macs_share: float,
    *,
    max_merges: int = 3,
    max_candidates: int = 40,
    track: Track = untracked,
) -> tuple[int, ...]:
    """Choose how many tokens merge in which block, such that the model's answers change least.

    Schedules of a few merges that meet the share are measured, and the best is varied: a merge in a neighbouring
    block, more or fewer tokens in one than in the others, one merge more or less. The same images give the same answer.

    Args:
        model: timm Vision Transformer in eval mode; answers are compared with those of it without merging.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels, which are
            not used. Read once, and held in memory; 100 to 200 images are enough.
        macs_share: multiply-accumulates of the result, at most, as a share of those without merging; in (0, 1).
        max_merges: at most so many blocks merge.
        max_candidates: so many schedules are measured, at most.
        track: shows progress.

    Returns:
        As ``set_merging`` takes it, with the least mean KL(dense || merged) of what was measured.

    Raises:
        VitpruneError: if the model cannot merge tokens, there are no images, or no schedule meets the share.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=24, img_size=64).eval()
    >>> batches = [(torch.randn(2, 3, 64, 64), torch.zeros(2))]
    >>> schedule = choose_schedule(model, batches, 0.8, max_merges=1, max_candidates=2)
    >>> count_macs(set_merging(model, schedule)) <= 0.8 * count_macs(model)
    True
    """
    (found,) = choose_schedules(
        model, batches, [macs_share], max_merges=max_merges, max_candidates=max_candidates, track=track
    )
    if found is None:
        raise VitpruneError(
            f"no {max_merges} merges leave at most {macs_share:g} of the multiply-accumulates; allow more of either"
        )
    return found


@torch.no_grad()
def choose_schedules(
    model: nn.Module,
    batches: Batches,
    macs_shares: Sequence[float],
    *,
    share_of: ShareOf | None = None,
    max_merges: int = 3,
    max_candidates: int = 40,
    max_varied: int = 8,
    start: Sequence[int] | None = None,
    track: Track = untracked,
) -> list[tuple[int, ...] | None]:
    """Choose a schedule for each of some shares, each from the one before.

    Args:
        model: as in ``choose_schedule``, as are ``batches``, ``max_merges`` and ``track``.
        batches: calibration images.
        macs_shares: what merging may leave; each in (0, 1).
        share_of: what a schedule leaves, where that is measured otherwise than in multiply-accumulates.
        max_merges: at most so many blocks merge; where three will do, no more than these.
        max_candidates: so many schedules are measured where there is none to start from, at most.
        max_varied: so many where the one before goes on to the next share.
        start: a schedule to start from, such as that of another image size.
        track: shows progress.

    Returns:
        A schedule for each share; None where none meets it.

    Raises:
        VitpruneError: if the model cannot merge tokens, or there are no images.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=24, img_size=64).eval()
    >>> batches = [(torch.randn(2, 3, 64, 64), torch.zeros(2))]
    >>> found = choose_schedules(model, batches, [0.9, 0.01], max_merges=1, max_candidates=1)
    >>> sum(found[0]) > 0, found[1]
    (True, None)
    """
    check_merging(model)
    for share in macs_shares:
        if not 0 < share < 1:
            raise VitpruneError(f"`macs_share` must be in (0, 1), got {share}")
    dense = split_attention(model if describe_merging(model) is None else set_merging(model, [0] * len(model.blocks)))
    images = []
    for images_B, labels in on_device(dense, batches):
        check_one_class(labels, "the choice of a schedule")
        images.append(images_B)
    if not images:
        raise VitpruneError("no calibration images")
    loss = answer_loss(dense)
    answers = [loss.refer(ask(dense, each).double()) for each in images]
    costs = _measure_costs(dense)

    def measure(schedule: Sequence[int]) -> float:
        return _measure_loss(set_merging(dense, schedule), images, answers)

    found: list[tuple[int, ...] | None] = []
    shape = {block: float(r) for block, r in enumerate(start or ()) if r}
    for share in macs_shares:
        fit = partial(costs.fit, share=share, share_of=share_of)
        guesses, limit = [shape], max_varied
        if not shape or fit(shape) is None:
            guesses = _first_guesses(fit, len(dense.blocks), max_merges)
            limit = max_varied + len(guesses) if shape else max_candidates
        best, schedule = _search(fit, guesses, measure, len(dense.blocks), limit, track)
        found.append(schedule)
        shape = shape if schedule is None else best
    return found


def _search(
    fit: Callable[[_Shape], tuple[int, ...] | None],
    guesses: Sequence[_Shape],
    measure: Callable[[Sequence[int]], float],
    num_blocks: int,
    max_candidates: int,
    track: Track,
) -> tuple[_Shape, tuple[int, ...] | None]:
    """Return the shape and the schedule of least loss that meet a share, from guesses on; None where none does."""
    losses: dict[tuple[int, ...], float] = {}
    best: _Shape = {}
    waiting, guessing = list(guesses), True
    for _number in track(range(max_candidates), "schedules"):
        shape, schedule = _next_new(waiting, fit, losses)
        if schedule is None:
            break
        losses[schedule] = measure(schedule)
        better = losses[schedule] <= min(losses.values())
        best = shape if better else best
        if not waiting or (better and not guessing):
            waiting, guessing = _neighbours(best, num_blocks), False
    return best, min(losses, key=lambda schedule: losses[schedule], default=None)


def _measure_loss(merged: nn.Module, images: Sequence[Tensor], answers: Sequence[Tensor]) -> float:
    """Return the mean over images of how far merging moves their answers."""
    loss = answer_loss(merged)
    moved = [loss.diverge(dense, ask(merged, each)) for each, dense in zip(images, answers, strict=True)]
    return mean_of_all(torch.cat(moved))


def _first_guesses(fit: Callable[[_Shape], tuple[int, ...] | None], num_blocks: int, max_merges: int) -> list[_Shape]:
    """Return merges of one size, evenly spread from some block on; of few blocks, or of more where these do not do."""
    guesses: list[_Shape] = []
    for num_merges in range(min(FEW_MERGES, max_merges), max_merges + 1):
        starts = dict.fromkeys(round(num_blocks * twelfth / 12) for twelfth in (3, 2, 1, 4, 0))
        spread = (
            [start + (num_blocks - start) * number // num_merges for number in range(num_merges)] for start in starts
        )
        guesses = [dict.fromkeys(blocks, 1.0) for blocks in spread]
        if any(fit(guess) is not None for guess in guesses):
            break
    return guesses


def _neighbours(shape: _Shape, num_blocks: int) -> list[_Shape]:
    """Return what differs by one step: a merge in the next block, larger or smaller beside the others, or left out."""
    result = []
    for block, weight in shape.items():
        others = {other: size for other, size in shape.items() if other != block}
        result += [
            dict(sorted({**others, moved: weight}.items()))
            for moved in (block - 1, block + 1)
            if 0 <= moved < num_blocks and moved not in others
        ]
        if others:
            result += [{**shape, block: weight * factor} for factor in (1.5, 1 / 1.5)]
            result.append(others)
    return result


def _next_new(
    waiting: list[_Shape],
    fit: Callable[[_Shape], tuple[int, ...] | None],
    known: Mapping[tuple[int, ...], float],
) -> tuple[_Shape, tuple[int, ...] | None]:
    """Take shapes from a list until one gives a schedule that meets the share and is not known."""
    while waiting:
        shape = waiting.pop(0)
        schedule = fit(shape)
        if schedule is not None and schedule not in known:
            return shape, schedule
    return {}, None


def _measure_costs(model: nn.Module) -> _Costs:
    model = copy.deepcopy(model).cpu().float().requires_grad_(False)
    few, many = (torch.zeros(1, number, model.embed_dim) for number in (4, 8))
    blocks = []
    for block in model.blocks:
        ffn = _count(block.mlp, few) / 4
        at_4, at_8 = (_count(block, x_BND) - ffn * x_BND.shape[1] for x_BND in (few, many))
        quadratic = (at_8 - 2 * at_4) / 32
        compared = block.attn.k.out_features if type(block.attn) is SplitAttention else None
        blocks.append(_BlockCost(at_4 / 4 - 4 * quadratic, quadratic, ffn, compared))
    return _Costs(count_macs(model), tuple(blocks), num_prefix_tokens(model), num_patches(model), model.embed_dim)


def _count(module: nn.Module, x_BND: Tensor) -> int:
    with plain_attention(module), FlopCounterMode(display=False) as counter:
        module(x_BND)
    return counter.get_total_flops() // 2
