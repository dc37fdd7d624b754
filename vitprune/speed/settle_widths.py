"""Decide how wide everything is, and time models of these widths, before their weights are fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from vitprune.calibration.criteria import REGISTRY as CRITERIA
from vitprune.data import Batches
from vitprune.errors import VitpruneError
from vitprune.images.resized_batches import follow_size
from vitprune.models.fewer_tokens import FewerTokens
from vitprune.models.units import FFN
from vitprune.options import DEFAULT_CRITERION
from vitprune.pruning.choose_tokens import go_on
from vitprune.pruning.decide_parts import Decided, decide_parts, study_parts
from vitprune.pruning.latency_model import LatencyModel
from vitprune.pruning.target import Target
from vitprune.speed.fit_latency import Format
from vitprune.speed.speed_candidates import Candidate, OutOfReachError, Seen, Timer, target_of

# A result that is slower than this share of what was asked for is decided again, and more mildly one that is faster
# than the other, so many times at most.
TOLERANCE, GENEROUS = 0.985, 1.02
MAX_ROUNDS = 3
# A result of fewer tokens alone that is faster than this is looked for anew: a milder schedule may do.
MUCH_FASTER = 1.05


def cuts(target: Target) -> bool:
    """Tell whether units have to go for a target."""
    return target.dense > target.limit


def is_near(speedups: Sequence[float], speedup: float, cuts: bool) -> bool:
    """Tell whether a result is fast enough and not milder than need be; without units to keep it cannot be milder."""
    return TOLERANCE * speedup <= min(speedups) <= (GENEROUS * speedup if cuts else float("inf"))


class Shaper:
    """What widths are decided from; each decision is made once.

    Args:
        model: the dense one.
        batches: calibration images and labels.
        parts: that may go.
        limit: ms that a run may take, in the time of the fit.
        look: fit -> candidates in its format, the least loss first, and the fit corrected by the best one's time.
        timer: of models.
        shared: ``ridge``, ``seed``, ``track``, ``allocation``, ``round_to`` and ``floor``, as ``prune`` takes them.
        criterion: that will rank neurons.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        parts: Sequence[str],
        limit: float,
        look: Callable[[LatencyModel], tuple[list[Candidate], LatencyModel]],
        timer: Timer,
        shared: Mapping[str, Any],
        criterion: str = DEFAULT_CRITERION,
    ) -> None:
        self.model, self.batches, self.parts, self.limit = model, batches, parts, limit
        self.look, self.timer, self.shared = look, timer, shared
        self.wanted = CRITERIA[criterion].statistics
        self.known: dict[Any, Any] = {}
        self.looked_again = False

    def settle(self, seen: Seen, speedup: float) -> Seen:
        """Return what was seen, with a fit by which the widths that are decided turn out as fast as asked for."""
        for _round in range(MAX_ROUNDS):
            chosen = seen.candidates[seen.best]
            try:
                shaped, _own, _left, target, decided = self.shape(seen)
            except VitpruneError:
                # The fit was further off than this schedule leaves room for: others, with what was measured.
                try:
                    again, latency = self.look(seen.latency)
                except VitpruneError as error:
                    raise OutOfReachError(f"{speedup:.4g} times as fast is out of reach; {error}") from error
                seen = replace(seen, candidates=(*seen.candidates, *again), best=len(seen.candidates), latency=latency)
                continue
            if decided is None and cuts(target):
                break  # neurons alone go, and their own ranking says how many of which FFN
            candidate = shaped if decided is None else decided.in_shape
            near = partial(is_near, speedup=speedup, cuts=cuts(target))
            speedups = self.timer.sure_speedups(candidate, Format(chosen.backend, chosen.precision), near)
            milder = None
            if not cuts(target) and min(speedups) > MUCH_FASTER * speedup:
                milder = self._look_for_milder(seen, candidate, speedups)
            if milder is not None:
                seen = milder
                continue
            if near(speedups):
                return replace(seen, settled=speedups)
            ratio = self.timer.dense_ms / seen.latency.predict(candidate) / min(speedups)
            seen = replace(seen, latency=seen.latency.scaled(ratio))
        return seen

    def _look_for_milder(self, seen: Seen, candidate: nn.Module, speedups: Sequence[float]) -> Seen | None:
        """Look once more with what was measured; None where nothing loses less, or all tokens are there already."""
        chosen = seen.candidates[seen.best]
        if self.looked_again or chosen.fewer == FewerTokens():
            return None
        self.looked_again = True
        ratio = self.timer.dense_ms / seen.latency.predict(candidate) / min(speedups)
        try:
            again, latency = self.look(seen.latency.scaled(ratio))
        except VitpruneError:  # what there is already is fast enough
            return None
        if again[0].loss >= chosen.loss:
            return None
        return replace(seen, candidates=(*seen.candidates, *again), best=len(seen.candidates), latency=latency)

    def shape(self, seen: Seen) -> tuple[nn.Module, Batches, tuple[str, ...], Target, Decided | None]:
        """Return the model with fewer tokens, its images, the parts that go of it, how far, and what is decided."""
        chosen, meter = seen.candidates[seen.best], seen.latency.meter()
        target = target_of(meter, self.model, self.limit)
        shaped, target, left = go_on(self.model, chosen.fewer, target, self.parts, meter)
        own = follow_size(self.batches, shaped, self.model)
        if left == (FFN,) or not cuts(target):
            return shaped, own, left, target, None
        names = ("allocation", "round_to", "floor", "ridge", "seed", "track")
        options = {name: self.shared[name] for name in names}
        if (chosen.fewer, left) not in self.known:
            measuring = {name: options[name] for name in ("ridge", "seed", "track")}
            self.known[chosen.fewer, left] = study_parts(shaped, own, left, self.wanted, **measuring)
        studied = self.known[chosen.fewer, left]
        key = (chosen.fewer, seen.latency)
        if key not in self.known:
            self.known[key] = decide_parts(shaped, own, left, target=target, studied=studied, **options)
        return shaped, own, left, target, self.known[key]
