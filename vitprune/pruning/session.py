"""A session: a dense model with all that pruning asks of it, each made once and when it is first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from torch import Tensor, nn

from vitprune.calibration.criteria import Scores, score_neurons
from vitprune.calibration.statistics import GRADIENTS, Statistics, measure_statistics
from vitprune.data import Batches
from vitprune.discovery.discover import Discovery
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.block_calls import BlockCall, study_blocks
from vitprune.models.merging import unmerged
from vitprune.models.units import Group, find_groups
from vitprune.options import DEFAULT_RIDGE
from vitprune.progress import Track, untracked
from vitprune.pruning.sequential import weigh_tokens
from vitprune.seen_images import SeenImages, seen_by, watch


class Session:
    """What programs over one model share: its groups, images, statistics and block calls.

    Args:
        model: timm Vision Transformer in eval mode; stays as it is.
        batches: calibration images and labels, readable more than once; None where nothing reads any.
        found: a discovery on this model, for criteria that need one.
        wanted: statistics that will be asked for, in the words of ``measure_statistics``: one pass measures them all.
        statistics: of this model, where they are there already.
        calls: from ``study_blocks`` on the dense model, where they are there already.
        dense: the model whose answers are aimed at, where ``model`` is a narrower one already; None: ``model``,
            without merging of tokens.
        token_weights: group name of the dense model -> how much each token counts, where that is known already.
        ridge: λ relative to the mean variance of the units.
        seed: of everything drawn at random.
        track: wraps (items, description) of long loops, for progress.

    >>> import timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
    >>> images = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]
    >>> session = Session(model, images, wanted={"moments"})
    >>> session.statistics["blocks.0.mlp"].mean_H.shape
    torch.Size([768])
    >>> session.statistics is session.statistics  # measured once
    True
    """

    @entry
    def __init__(
        self,
        model: nn.Module,
        batches: Batches | None = None,
        *,
        found: Discovery | None = None,
        wanted: frozenset[str] | set[str] = frozenset(),
        statistics: Mapping[str, Statistics] | None = None,
        calls: Mapping[str, BlockCall] | None = None,
        dense: nn.Module | None = None,
        token_weights: Mapping[str, Tensor] | None = None,
        ridge: float = DEFAULT_RIDGE,
        seed: int = 0,
        track: Track = untracked,
    ) -> None:
        self.model, self.batches, self.found = model, watch(batches), found
        self.dense = unmerged(model) if dense is None else dense
        self.wanted, self.ridge, self.seed, self.track = frozenset(wanted), ridge, seed, track
        if statistics is not None:
            self.statistics = statistics
        if calls is not None:
            self.calls = calls
        if token_weights is not None:
            self.token_weights = token_weights

    @cached_property
    def groups(self) -> Sequence[Group]:
        """The groups of units that can be removed."""
        return find_groups(self.model)

    @cached_property
    def statistics(self) -> Mapping[str, Statistics]:
        """Group name -> the statistics that are wanted; empty where none are.

        Raises:
            VitpruneError: if some are wanted and there are no images.
        """
        if not self.wanted:
            return {}
        if self.batches is None:
            raise VitpruneError("compensation needs calibration images; pass `batches`")
        return measure_statistics(self.model, self.groups, self.batches, self.wanted, seed=self.seed)

    @cached_property
    def calls(self) -> Mapping[str, BlockCall]:
        """Group name -> how to run its block by itself.

        Raises:
            VitpruneError: as ``study_blocks`` does.
        """
        groups = self.groups if self.dense is self.model else find_groups(self.dense)
        return study_blocks(self.dense, groups, self.batches)

    @cached_property
    def token_weights(self) -> Mapping[str, Tensor]:
        """Group name -> how much each token counts, as ``weigh_tokens`` gives it."""
        statistics = self.statistics
        if not statistics or next(iter(statistics.values())).energy_N is None:
            statistics = measure_statistics(self.model, self.groups, self.batches, {GRADIENTS}, seed=self.seed)
        return weigh_tokens(self.model, statistics)

    @property
    def seen(self) -> SeenImages:
        """All images that had a say, here or in the model before."""
        read = SeenImages() if self.batches is None else self.batches.seen
        return read.with_hashes(seen_by(self.model))

    def score(self, criterion: str, track: Track | None = None) -> Scores:
        """Score every unit by a criterion, from the statistics of the session; ``track`` in place of its own."""
        return score_neurons(
            self.model,
            criterion,
            batches=self.batches,
            found=self.found,
            statistics=self.statistics or None,
            ridge=self.ridge,
            seed=self.seed,
            track=self.track if track is None else track,
        )
