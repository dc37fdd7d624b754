"""Where a plan came from: what was asked for, how it was decided, on which images, and how large its model is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vitprune.models.macs import Sizes, amdahl_ceiling
from vitprune.seen_images import SeenImages


@dataclass(frozen=True)
class Asked:
    """What the model was to cost.

    Attributes:
        kind: key of ``TARGETS``.
        limit: at most, in the unit of the kind.
        predicted: for the plan.
        dense: before pruning.
    """

    kind: str
    limit: float
    predicted: float
    dense: float


@dataclass(frozen=True)
class Facts:
    """Where a plan came from; what is not known is None.

    Attributes:
        architecture: timm name of the model.
        weights_sha256: ``hash_weights`` of the dense model.
        pruning_ratio_asked: share of FFN neurons that was to be removed.
        target: what the model was to cost.
        criterion: key of ``CRITERIA``.
        keep_paths: K, where the neurons of the class paths stay, K of each class in each FFN.
        allocation: key of ``ALLOCATIONS``.
        round_to: every width is a multiple of it.
        floor: share that ``global`` leaves to each group at least.
        step: share that went between two rankings.
        compensation: key of ``COMPENSATIONS``.
        mode: key of ``MODES``.
        ridge: λ of the compensation.
        seed: of everything drawn at random.
        calibration: every image that had a say in the plan or its compensation.
        sizes: of the pruned model.
        sizes_dense: of the dense model.
        ffn_share: share of the dense model's multiply-accumulates in its FFNs.
        stand_ins: attention or FFN that goes as a whole -> what stands there, ``bias`` or ``map``.
        merge: how many tokens disappear in each block.
        image_size: height and width that the model is fed, where the dense model was made for another size.
        label_names: what the classes of the model are called, in order.
        opened: how the dense model was loaded, as ``load`` leaves it on the model: name, checkpoint and what was said.
    """

    architecture: str | None = None
    weights_sha256: str | None = None
    pruning_ratio_asked: float | None = None
    target: Asked | None = None
    criterion: str | None = None
    keep_paths: int | None = None
    allocation: str | None = None
    round_to: int | None = None
    floor: float | None = None
    step: float | None = None
    compensation: str | None = None
    mode: str | None = None
    ridge: float | None = None
    seed: int | None = None
    calibration: SeenImages = field(default_factory=SeenImages)
    sizes: Sizes | None = None
    sizes_dense: Sizes | None = None
    ffn_share: float | None = None
    stand_ins: Mapping[str, str] | None = None
    merge: tuple[int, ...] | None = None
    image_size: tuple[int, int] | None = None
    label_names: tuple[str, ...] | None = None
    opened: Mapping[str, Any] | None = None

    @property
    def speedup_ceiling(self) -> float | None:
        """What fewer multiply-accumulates allow at most (Amdahl); None where they are not known."""
        if self.sizes is None or self.sizes_dense is None:
            return None
        return amdahl_ceiling(self.sizes_dense.macs, self.sizes.macs)

    def as_json(self) -> dict[str, Any]:
        """Return what is known, as JSON values."""
        content = {each.name: getattr(self, each.name) for each in fields(self)}
        for name in ("target", "sizes", "sizes_dense"):
            content[name] = None if content[name] is None else asdict(content[name])
        content["calibration"] = self.calibration.as_json() if self.calibration else None
        return {name: value for name, value in content.items() if value is not None}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Facts:
        """Read what ``as_json`` gave; what another version knew beside that is left out."""
        known = {each.name for each in fields(cls)}
        read = {name: value for name, value in content.items() if name in known and value is not None}
        for name, kind in (("target", Asked), ("sizes", Sizes), ("sizes_dense", Sizes)):
            if name in read:
                read[name] = kind(**read[name])
        for name in ("merge", "image_size", "label_names"):
            if name in read:
                read[name] = tuple(read[name])
        if "calibration" in read:
            read["calibration"] = SeenImages.from_json(read["calibration"])
        return cls(**read)
