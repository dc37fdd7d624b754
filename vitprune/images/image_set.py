"""Which images, and which model output each belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vitprune.batches import NO_LABEL


@dataclass(frozen=True)
class ImageSet:
    """Which images, and which model output each belongs to.

    Attributes:
        root: the data folder, the folder of the list, or the .tar file; absolute.
        files: image files relative to ``root``, sorted.
        labels: per file, the index of its class among the model's outputs; -1 for all where that is not known.
        class_names: class index -> folder name, for the classes present.
        left_out: names of folders below ``root`` that are none of the model's classes.
        passed_over: files that look as if they were meant as images and are none, or belong to no class.
        numbering: how the classes were numbered, or why they could not be; for people.
        label_names: what every class of the model is called, in order; empty where that is not sure.
    """

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: Mapping[int, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    # How they were found; two sets of the same images may differ in it.
    passed_over: tuple[str, ...] = field(default=(), compare=False)
    numbering: str = field(default="", compare=False)
    label_names: tuple[str, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def has_labels(self) -> bool:
        """Whether the class of every image is known."""
        return NO_LABEL not in self.labels

    def head(self, count: int) -> ImageSet:
        """Return ``count`` images spread evenly over the set (all of them if there are fewer)."""
        if count >= len(self):
            return self
        picked = [index * len(self) // count for index in range(count)]
        return self.at(picked)

    def only(self, files: Sequence[str]) -> ImageSet:
        """Return the images named in ``files``, in this set's order."""
        wanted = set(files)
        return self.at([index for index, name in enumerate(self.files) if name in wanted])

    def only_classes(self, classes: Sequence[int]) -> ImageSet:
        """Return the images of some classes, renumbered: ``classes[i]`` becomes i."""
        position = {index: place for place, index in enumerate(classes)}
        picked = [index for index, label in enumerate(self.labels) if label in position]
        labels = tuple(position[self.labels[index]] for index in picked)
        names = {position[index]: name for index, name in self.class_names.items() if index in position}
        known = tuple(self.label_names[index] for index in classes) if self.label_names else ()
        files = tuple(self.files[index] for index in picked)
        return replace(self, files=files, labels=labels, class_names=names, label_names=known)

    def at(self, picked: Sequence[int]) -> ImageSet:
        """Return the images at these places, in the order given."""
        labels = tuple(self.labels[index] for index in picked)
        present = set(labels)
        names = {label: name for label, name in self.class_names.items() if label in present}
        return replace(self, files=tuple(self.files[i] for i in picked), labels=labels, class_names=names)
