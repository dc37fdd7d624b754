"""The elastic file: one model at any pruning ratio.

Each group's units lie in the order of their importance, so a smaller model is the first of them. The dense tensors are
there once; every *stop*, a ratio at which the model was compensated, adds the tensors that compensation changed.

Between two stops: the mean output of the neurons that are gone since the stop before goes into the bias; then, where
compensation changes weights, every tensor moves in a straight line to the stop after, whose missing neurons count as
zeros. An FFN is linear in its output projection, so on the same inputs its squared error there is at most the weighted
mean of both ends' errors. Heads and whole layers go at a stop; before one where some go, tensors do not move.

Letters: D embedding width, H hidden neurons of the dense model, S those kept at a stop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.files import open_tensors, read_kind, write_tensors
from vitprune.models.attention import HEADS
from vitprune.models.build import ATTENTION_KEY, LEFT_OUT_KEY, build, describe, fill, restore
from vitprune.models.facts import Facts
from vitprune.models.identity import hash_weights
from vitprune.models.units import FFN, LAYERS, Group, find_groups, kind_of, module_of, read_group, take_units
from vitprune.seal import parsing

ELASTIC = "elastic"


@dataclass(frozen=True)
class Ranking:
    """Which units stay at which ratio; those of a larger ratio are among those of every smaller one.

    Every part loses the same share of its units. Heads and whole layers go at a stop, all else in between too.

    Attributes:
        order: group name -> indices of the dense model's units [H], the last to go first; int64.
        budgets: group name -> how many units of the kind the whole model must be allowed for each of them to be kept
            [H], in the same order; int64, non-decreasing.
        largest: the largest ratio that it covers, in (0, 1).
        stops: ratios at which heads and layers go; rising.
        layers: names of the attentions and FFNs that may go as a whole, in the order in which they run.
        stand_ins: some of them with what stands in, ``bias`` or ``map``; the first to go first.
    """

    order: Mapping[str, Tensor]
    budgets: Mapping[str, Tensor]
    largest: float
    stops: Sequence[float] = ()
    layers: Sequence[str] = ()
    stand_ins: Sequence[tuple[str, str]] = ()

    @property
    def num_neurons_dense(self) -> int:
        """Neurons of the dense model in all FFNs."""
        return self._num_units(FFN)

    def _num_units(self, kind: str) -> int:
        return sum(len(order_H) for name, order_H in self.order.items() if kind_of(name) == kind)

    def widths(self, ratio: float) -> dict[str, int]:
        """Return how many units each group keeps when at least this share of all of its kind goes.

        Raises:
            VitpruneError: if ``ratio`` is not in [0, 1), or beyond the largest.

        >>> order = {"a": torch.arange(4), "b": torch.arange(4)}
        >>> budgets = {"a": torch.tensor([0, 0, 0, 5]), "b": torch.tensor([0, 6, 7, 8])}
        >>> Ranking(order, budgets, largest=0.5).widths(0.3)
        {'a': 4, 'b': 1}
        """
        left_out = self.left_out(ratio)
        kinds = {name: kind_of(name) for name in self.order}
        budgets = {
            kind: self._budget(kind, self._at_stop(ratio) if kind == HEADS else ratio) for kind in kinds.values()
        }
        widths = {name: int((self.budgets[name] <= budgets[kind]).sum()) for name, kind in kinds.items()}
        return {name: 0 if module_of(name) in left_out else width for name, width in widths.items()}

    def left_out(self, ratio: float) -> dict[str, str]:
        """Return the layers that are gone as a whole, with what stands in; errors are those of ``widths``."""
        if not 0 <= ratio < 1:
            raise VitpruneError(f"ratio must be in [0, 1), got {ratio}")
        kinds = map(kind_of, self.order)
        if ratio > self.largest and (
            not self.order or any(self._budget(kind, ratio) < self._budget(kind, self.largest) for kind in kinds)
        ):
            raise VitpruneError(f"ratio {ratio:g} is beyond the largest of this elastic model, {self.largest:g}")
        return dict(self.stand_ins[: math.floor(len(self.layers) * self._at_stop(ratio) + 1e-9)])

    def keep(self, ratio: float) -> dict[str, Tensor]:
        """Return group name -> which units of the dense model stay, bool [H]; errors are those of ``widths``."""
        kept = {name: torch.zeros(len(order_H), dtype=torch.bool) for name, order_H in self.order.items()}
        for name, width in self.widths(ratio).items():
            kept[name][self.order[name][:width]] = True
        left_out = self.left_out(ratio)
        return {**kept, **{f"{layer}.{LAYERS}": torch.tensor([layer not in left_out]) for layer in self.layers}}

    def _at_stop(self, ratio: float) -> float:
        return max((stop for stop in self.stops if stop <= ratio + 1e-12), default=0.0)

    def _budget(self, kind: str, ratio: float) -> int:
        # 9216 * (1 - 0.3) is 6451.199999999999 in floating point: the tolerance keeps exact products exact.
        return math.floor(self._num_units(kind) * (1 - ratio) * (1 + 1e-12))


@dataclass(frozen=True)
class Stop:
    """A ratio at which the model was compensated.

    Attributes:
        ratio: asked for, in [0, 1); 0 is the dense model.
        widths: group name -> units kept; 0 where the layer is gone.
        changed: key of the state dict -> tensor, where it is not the dense model's: biases, output projections [D, S]
            with units in the ranking's order, what stands in for layers, others of the dense shape.
        left_out: layers that are gone as a whole -> ``bias`` or ``map``.
    """

    ratio: float
    widths: Mapping[str, int]
    changed: Mapping[str, Tensor]
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Elastic:
    """What an elastic file holds beside the dense model.

    Attributes:
        ranking: which neurons stay at which ratio.
        stops: rising ratios, 0 first.
        means: group name -> mean of what the dense model's output projection reads, over the calibration images'
            tokens, units in the ranking's order; float64. Empty where nothing is compensated.
        mixed: whether tensors move in a straight line between stops.
        facts: where it came from.
        turned: the dense model with its attention in order, where parts of that may go.
    """

    ranking: Ranking
    stops: Sequence[Stop]
    means: Mapping[str, Tensor]
    mixed: bool
    facts: Facts
    turned: nn.Module | None = None


def write_elastic(
    path: str | Path,
    elastic: Elastic,
    *,
    state: Mapping[str, Tensor],
    groups: Sequence[Group],
    config: Mapping[str, Any],
) -> None:
    """Write an elastic file; whole or not at all.

    Args:
        path: the file.
        elastic: what to write beside the dense model.
        state: of the dense model.
        groups: of the dense model.
        config: what it takes to build the dense model; JSON values.
    """
    ranking = elastic.ranking
    dense = take_units({key: value.detach().cpu() for key, value in state.items()}, groups, ranking.order)
    tensors = {f"dense/{key}": value for key, value in dense.items()}
    for name, order_H in ranking.order.items():
        tensors[f"order/{name}"] = order_H.int()
        tensors[f"budgets/{name}"] = ranking.budgets[name].int()
    tensors.update({f"means/{name}": mean_H for name, mean_H in elastic.means.items()})
    for number, stop in enumerate(elastic.stops):
        tensors.update({f"stops/{number}/{key}": value for key, value in stop.changed.items()})
    header = {
        "config": dict(config),
        "groups": [asdict(group) for group in groups],
        "largest": ranking.largest,
        "layers": list(ranking.layers),
        "stand_ins": [list(pair) for pair in ranking.stand_ins],
        "stops": [
            {"ratio": stop.ratio, "widths": dict(stop.widths), "left_out": dict(stop.left_out)}
            for stop in elastic.stops
        ],
        "mixed": elastic.mixed,
        "facts": elastic.facts.as_json(),
    }
    write_tensors(path, tensors, kind=ELASTIC, facts=header)


def read_ranking(path: str | Path) -> tuple[Ranking, Facts]:
    """Read from an elastic file which neurons stay at which ratio, and the facts.

    Raises:
        VitpruneError: if the file is missing, or no elastic file.
    """
    with open_tensors(path, kind=ELASTIC) as (stream, header), parsing(path):
        return _read_ranking(stream, header), Facts.from_json(header["facts"])


def _read_ranking(stream: Any, header: Mapping[str, Any]) -> Ranking:
    names = [group.name for group in _read_groups(header)]
    order, budgets = (
        {name: stream.get_tensor(f"{what}/{name}").long() for name in names} for what in ("order", "budgets")
    )
    whole = {
        "stops": tuple(stop["ratio"] for stop in header["stops"]),
        "layers": tuple(header.get("layers", ())),
        "stand_ins": tuple((layer, kind) for layer, kind in header.get("stand_ins", ())),
    }
    if not 0 <= header["largest"] < 1:
        raise ValueError(f"its largest ratio is {header['largest']}")
    return Ranking(order, budgets, header["largest"], **whole)


def read_state(path: str | Path, ratio: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the model of one ratio from an elastic file, and only the tensors that it takes.

    Neurons come in the dense model's order, so that a stop is bit for bit what was pruned.

    Args:
        path: an elastic file.
        ratio: share of all FFN neurons to be gone, at least; in [0, 1).

    Returns:
        What it takes to build the dense model, and the state dict of the smaller one.

    Raises:
        VitpruneError: if the file is missing or no elastic file, or ``ratio`` is out of range or beyond the last stop.
    """
    with open_tensors(path, kind=ELASTIC) as (stream, header):
        ranking, stops = _read_ranking(stream, header), header["stops"]
        widths = ranking.widths(ratio)
        left_out = ranking.left_out(ratio)
        number = _stop_before(stops, widths, left_out)
        whole, groups = _read_groups(header), groups_left(_read_groups(header), widths)
        means = {name: stream.get_tensor(key) for name, key in _keys(stream, "means/").items()}
        dense = {
            name: key
            for name, key in _keys(stream, "dense/").items()
            if not name.startswith(tuple(f"{layer}." for layer in left_out))
        }
        here, there = ({**dense, **_keys(stream, f"stops/{n}/")} for n in (number, number + 1))
        state = {name: stream.get_tensor(key) for name, key in here.items()}
        share = _share_of_way(stops, number, widths) if header["mixed"] else 0.0
        readers = {group.read_by for group in groups if group.silenced.axis == 1}
        rows = {part.linear for group in groups for part in group.owned if part.axis == 0}
        moving = [
            name
            for name, key in there.items()
            if name.rpartition(".")[0] in readers or (here.get(name) != key and name.rpartition(".")[0] not in rows)
        ]
        after = {name: stream.get_tensor(there[name]) for name in moving} if share else {}
    before, dense_units = stops[number]["widths"], {group.name: group.num_units for group in whole}
    for group in groups:
        if group.name in means and widths[group.name] < before[group.name]:
            gone = torch.arange(widths[group.name], before[group.name])
            weight_DS = state[f"{group.read_by}.weight"]
            columns = group.silenced.indices(gone, weight_DS.shape[1] // group.silenced.copies)
            mean_H = means[group.name][group.silenced.indices(gone, dense_units[group.name])]
            shift_D = (weight_DS[:, columns].double() @ mean_H).to(weight_DS.dtype)
            state[f"{group.read_by}.bias"] = _bias(state, group) + shift_D
    state = take_units(state, groups, {group.name: torch.arange(widths[group.name]) for group in groups})
    if share:
        state = _mix(state, after, groups, share, stops[number + 1]["widths"])
    places = {name: order_H[: widths[name]].argsort() for name, order_H in ranking.order.items()}
    return _describe_left(header["config"], left_out, widths), take_units(state, groups, places)


def groups_left(groups: Sequence[Group], widths: Mapping[str, int]) -> list[Group]:
    """Return the groups of a model that a file slices, as they stand where heads and layers are gone.

    Args:
        groups: of the dense model.
        widths: group name -> units kept.

    >>> from vitprune.models.units import Slice
    >>> group = Group("a.qk", "qk", 4, (Slice("a.q", axis=0, copies=3),), "a.q")
    >>> groups_left([group], {"a.qk": 4, "a.heads": 2})[0].owned[0].copies
    2
    """
    result = []
    for group in groups:
        if group.kind == HEADS or widths[group.name] == 0:
            continue
        heads = widths.get(f"{group.module}.{HEADS}")
        owned = group.owned if heads is None or group.kind == FFN else [replace(p, copies=heads) for p in group.owned]
        result.append(replace(group, owned=tuple(owned)))
    return result


def _describe_left(config: Mapping[str, Any], left_out: Mapping[str, str], widths: Mapping[str, int]) -> dict[str, Any]:
    """Return what it takes to build the model without the layers and heads that are gone."""
    attention = {
        name: {**facts, "num_heads": widths.get(f"{name}.{HEADS}", facts["num_heads"])}
        for name, facts in (config.get(ATTENTION_KEY) or {}).items()
        if name not in left_out
    }
    gone = {**(config.get(LEFT_OUT_KEY) or {}), **left_out}
    changed = {ATTENTION_KEY: attention, LEFT_OUT_KEY: gone}
    return {**config, **{key: value for key, value in changed.items() if value}}


def _read_groups(header: Mapping[str, Any]) -> list[Group]:
    described = header["groups"] if "groups" in header else header["ffns"]
    return [read_group(group) for group in described]


def _keys(stream: Any, prefix: str) -> dict[str, str]:
    keys = [key for key in stream.keys() if key.startswith(prefix)]  # noqa: SIM118 (no mapping)
    return {key.removeprefix(prefix): key for key in keys}


def _stop_before(stops: Sequence[Mapping[str, Any]], widths: Mapping[str, int], left_out: Mapping[str, str]) -> int:
    """Return the number of the last stop that still has all units and layers of a model."""
    return max(
        number
        for number, stop in enumerate(stops)
        if all(stop["widths"][name] >= width for name, width in widths.items())
        and stop.get("left_out", {}).keys() <= left_out.keys()
    )


def _share_of_way(stops: Sequence[Mapping[str, Any]], number: int, widths: Mapping[str, int]) -> float:
    """Return which share of the units that go until the next stop are gone, in [0, 1); 0 where heads or layers go."""
    if number + 1 == len(stops) or stops[number].get("left_out") != stops[number + 1].get("left_out"):
        return 0.0
    here, there = (stops[n]["widths"] for n in (number, number + 1))
    if any(kind_of(name) == HEADS and here[name] != there[name] for name in here):
        return 0.0
    gone = sum(here.values()) - sum(widths.values())
    return gone / (sum(here.values()) - sum(there.values())) if gone else 0.0


def _mix(
    state: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    groups: Sequence[Group],
    share: float,
    widths_after: Mapping[str, int],
) -> dict[str, Tensor]:
    """Move tensors a share of the way to the stop after; output projections keep their widths."""
    result, after = dict(state), dict(after)
    for group in groups:
        part = group.silenced
        if part.axis == 0:
            continue
        weight, bias, units = f"{group.read_by}.weight", f"{group.read_by}.bias", torch.arange(widths_after[group.name])
        kept, there = (tensor.shape[1] // part.copies for tensor in (state[weight], after[weight]))
        goal = torch.zeros_like(state[weight])
        goal[:, part.indices(units, kept)] = after[weight][:, part.indices(units, there)]
        after[weight] = goal
        if bias in state or bias in after:
            result[bias], after[bias] = _bias(state, group), _bias(after, group)
    for key, goal in after.items():
        if goal.is_floating_point():
            result[key] = torch.lerp(result[key].double(), goal.double(), share).to(goal.dtype)
    return result


def _bias(state: Mapping[str, Tensor], group: Group) -> Tensor:
    """Return the bias of an output projection; zeros where it has none."""
    return state.get(f"{group.read_by}.bias", torch.zeros_like(state[f"{group.read_by}.weight"][:, 0]))


@entry
def save_elastic(model: nn.Module, elastic: Elastic, path: str | Path) -> None:
    """Write an elastic file: the dense model once, and what every stop changes; whole or not at all.

    Args:
        model: the dense model that ``elastic`` is of; described as in ``save``.
        elastic: from ``vitprune.make_elastic``.
        path: the file, ``.safetensors``; replaced if it exists.

    Raises:
        VitpruneError: if the model is another one, the file would not load again, or it cannot be written.

    >>> import tempfile, timm
    >>> from vitprune import load, make_elastic
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    >>> elastic = make_elastic(model, ratios=[0.5], criterion="magnitude", compensation="none")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_elastic(model, elastic, Path(folder) / "tiny.safetensors")
    ...     load(Path(folder) / "tiny.safetensors", ratio=0.5).blocks[0].mlp.fc2.in_features < 768
    True
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise VitpruneError(f"{path}: an elastic file is called .safetensors")
    if hash_weights(model) != elastic.facts.weights_sha256:
        raise VitpruneError(f"{path}: the elastic model was made of other weights than this model has")
    kinds = list(dict.fromkeys(kind_of(name) for name in elastic.ranking.order))
    model = model if elastic.turned is None else elastic.turned
    config, state = describe(model), model.state_dict()
    fill(
        restore(build(config, str(path)), config, str(path)),
        state,
        f"{path} would not load again: the model does not fit its description",
    )
    write_elastic(path, elastic, state=state, groups=find_groups(model, kinds) if kinds else [], config=config)


def load_elastic(path: Path, ratio: float) -> nn.Module:
    """Load the model of one ratio from an elastic file.

    Raises:
        VitpruneError: as ``read_state`` does, or if the file holds weights without their model.
    """
    kind = read_kind(path)
    if kind is None:
        raise VitpruneError(f"{path} holds weights without their model; pass a timm name, and this as `checkpoint`")
    if kind != ELASTIC:
        raise VitpruneError(f"{path} is no model but a vitprune file of kind '{kind}'")
    try:
        with parsing(path):
            config, state = read_state(path, ratio)
    except VitpruneError as error:
        if path.name in str(error):
            raise
        raise VitpruneError(f"{path}: {error}") from error
    model = fill(
        restore(build(config, str(path)), config, str(path)), state, f"{path} does not fit its own description"
    )
    _ranking, facts = read_ranking(path)
    if facts.calibration:
        model.calibration = facts.calibration.sha256
    return model
