"""The elastic file: one model at any pruning ratio.

Each FFN's neurons lie in the order of their importance, so a smaller model is the first of them. The dense tensors are
there once; every *stop*, a ratio at which the model was compensated, adds the tensors that compensation changed.

Between two stops: the mean output of the neurons that are gone since the stop before goes into the bias; then, where
compensation changes weights, every tensor moves in a straight line to the stop after, whose missing neurons count as
zeros. An FFN is linear in its output projection, so on the same inputs its squared error there is at most the weighted
mean of both ends' errors.

Letters: D embedding width, H hidden neurons of the dense model, S those kept at a stop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.errors import VitpruneError
from vitprune.files import open_tensors, read_kind, write_tensors
from vitprune.models.build import build, describe, fill, restore
from vitprune.models.facts import Facts
from vitprune.models.identity import hash_weights
from vitprune.models.units import Group, find_groups, read_group, take_units

ELASTIC = "elastic"


@dataclass(frozen=True)
class Ranking:
    """Which neurons stay at which ratio; those of a larger ratio are among those of every smaller one.

    Attributes:
        order: FFN name -> indices of the dense model's neurons [H], the last to go first; int64.
        budgets: FFN name -> how many neurons the whole model must be allowed for each of them to be kept [H], in the
            same order; int64, non-decreasing.
        largest: the largest ratio that it covers, in (0, 1).
    """

    order: Mapping[str, Tensor]
    budgets: Mapping[str, Tensor]
    largest: float

    @property
    def num_neurons_dense(self) -> int:
        """Neurons of the dense model in all FFNs."""
        return sum(len(order_H) for order_H in self.order.values())

    def widths(self, ratio: float) -> dict[str, int]:
        """Return how many neurons each FFN keeps when at least this share of all goes.

        Raises:
            VitpruneError: if ``ratio`` is not in [0, 1), or beyond the largest.

        >>> order = {"a": torch.arange(4), "b": torch.arange(4)}
        >>> budgets = {"a": torch.tensor([0, 0, 0, 5]), "b": torch.tensor([0, 6, 7, 8])}
        >>> Ranking(order, budgets, largest=0.5).widths(0.3)
        {'a': 4, 'b': 1}
        """
        if not 0 <= ratio < 1:
            raise VitpruneError(f"ratio must be in [0, 1), got {ratio}")
        if self._budget(ratio) < self._budget(self.largest):
            raise VitpruneError(f"ratio {ratio:g} is beyond the largest of this elastic model, {self.largest:g}")
        budget = self._budget(ratio)
        return {name: int((budgets_H <= budget).sum()) for name, budgets_H in self.budgets.items()}

    def keep(self, ratio: float) -> dict[str, Tensor]:
        """Return FFN name -> which neurons of the dense model stay, bool [H]; errors are those of ``widths``."""
        kept = {name: torch.zeros(len(order_H), dtype=torch.bool) for name, order_H in self.order.items()}
        for name, width in self.widths(ratio).items():
            kept[name][self.order[name][:width]] = True
        return kept

    def _budget(self, ratio: float) -> int:
        # 9216 * (1 - 0.3) is 6451.199999999999 in floating point: the tolerance keeps exact products exact.
        return math.floor(self.num_neurons_dense * (1 - ratio) * (1 + 1e-12))


@dataclass(frozen=True)
class Stop:
    """A ratio at which the model was compensated.

    Attributes:
        ratio: asked for, in [0, 1); 0 is the dense model.
        widths: FFN name -> neurons kept.
        changed: key of the state dict -> tensor, where it is not the dense model's: biases, output projections [D, S]
            with neurons in the ranking's order, others of the dense shape.
    """

    ratio: float
    widths: Mapping[str, int]
    changed: Mapping[str, Tensor]


@dataclass(frozen=True)
class Elastic:
    """What an elastic file holds beside the dense model.

    Attributes:
        ranking: which neurons stay at which ratio.
        stops: rising ratios, 0 first.
        means: FFN name -> mean of the dense model's neurons over the calibration images' tokens [H], in the ranking's
            order; float64. Empty where nothing is compensated.
        mixed: whether tensors move in a straight line between stops.
        facts: where it came from.
    """

    ranking: Ranking
    stops: Sequence[Stop]
    means: Mapping[str, Tensor]
    mixed: bool
    facts: Facts


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
        "stops": [{"ratio": stop.ratio, "widths": dict(stop.widths)} for stop in elastic.stops],
        "mixed": elastic.mixed,
        "facts": elastic.facts.as_json(),
    }
    write_tensors(path, tensors, kind=ELASTIC, facts=header)


def read_ranking(path: str | Path) -> tuple[Ranking, Facts]:
    """Read from an elastic file which neurons stay at which ratio, and the facts.

    Raises:
        VitpruneError: if the file is missing, or no elastic file.
    """
    with open_tensors(path, kind=ELASTIC) as (stream, header):
        return _read_ranking(stream, header), Facts.from_json(header["facts"])


def _read_ranking(stream: Any, header: Mapping[str, Any]) -> Ranking:
    names = [group.name for group in _read_groups(header)]
    order, budgets = (
        {name: stream.get_tensor(f"{what}/{name}").long() for name in names} for what in ("order", "budgets")
    )
    return Ranking(order, budgets, header["largest"])


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
        number = _stop_before(stops, widths)
        groups = _read_groups(header)
        means = {name: stream.get_tensor(key) for name, key in _keys(stream, "means/").items()}
        here, there = ({**_keys(stream, "dense/"), **_keys(stream, f"stops/{n}/")} for n in (number, number + 1))
        state = {name: stream.get_tensor(key) for name, key in here.items()}
        share = _share_of_way(stops, number, widths) if header["mixed"] else 0.0
        readers = {group.read_by for group in groups}
        moving = [name for name, key in there.items() if here.get(name) != key or name.rpartition(".")[0] in readers]
        after = {name: stream.get_tensor(there[name]) for name in moving} if share else {}
    before = stops[number]["widths"]
    for group in groups:
        if means and widths[group.name] < before[group.name]:
            gone = slice(widths[group.name], before[group.name])
            weight_DS = state[f"{group.read_by}.weight"]
            shift_D = (weight_DS[:, gone].double() @ means[group.name][gone]).to(weight_DS.dtype)
            state[f"{group.read_by}.bias"] = _bias(state, group) + shift_D
    state = take_units(state, groups, {name: torch.arange(width) for name, width in widths.items()})
    if share:
        state = _mix(state, after, groups, share, stops[number + 1]["widths"])
    places = {name: order_H[: widths[name]].argsort() for name, order_H in ranking.order.items()}
    return header["config"], take_units(state, groups, places)


def _read_groups(header: Mapping[str, Any]) -> list[Group]:
    return [read_group(described) for described in header.get("groups") or header["ffns"]]


def _keys(stream: Any, prefix: str) -> dict[str, str]:
    keys = [key for key in stream.keys() if key.startswith(prefix)]  # noqa: SIM118 (no mapping)
    return {key.removeprefix(prefix): key for key in keys}


def _stop_before(stops: Sequence[Mapping[str, Any]], widths: Mapping[str, int]) -> int:
    """Return the number of the last stop that still has all neurons of these widths."""
    fitting = (
        number
        for number, stop in enumerate(stops)
        if all(stop["widths"][name] >= width for name, width in widths.items())
    )
    return max(fitting)


def _share_of_way(stops: Sequence[Mapping[str, Any]], number: int, widths: Mapping[str, int]) -> float:
    """Return how many of the neurons that go between a stop and the next are gone, in [0, 1)."""
    here = sum(stops[number]["widths"].values())
    gone = here - sum(widths.values())
    return gone / (here - sum(stops[number + 1]["widths"].values())) if gone else 0.0


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
        weight, bias, width = f"{group.read_by}.weight", f"{group.read_by}.bias", widths_after[group.name]
        missing = state[weight].shape[1] - width
        after[weight] = nn.functional.pad(after[weight][:, :width], (0, missing))
        if bias in state or bias in after:
            result[bias], after[bias] = _bias(state, group), _bias(after, group)
    for key, goal in after.items():
        if goal.is_floating_point():
            result[key] = torch.lerp(result[key].double(), goal.double(), share).to(goal.dtype)
    return result


def _bias(state: Mapping[str, Tensor], group: Group) -> Tensor:
    """Return the bias of an output projection; zeros where it has none."""
    return state.get(f"{group.read_by}.bias", torch.zeros_like(state[f"{group.read_by}.weight"][:, 0]))


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
    config, state = describe(model), model.state_dict()
    fill(
        restore(build(config, str(path)), config, str(path)),
        state,
        f"{path} would not load again: the model does not fit its description",
    )
    write_elastic(path, elastic, state=state, groups=find_groups(model), config=config)


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
    config, state = read_state(path, ratio)
    model = fill(
        restore(build(config, str(path)), config, str(path)), state, f"{path} does not fit its own description"
    )
    _ranking, facts = read_ranking(path)
    if facts.calibration:
        model.calibration = facts.calibration.sha256
    return model
