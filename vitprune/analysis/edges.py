r"""Which node of a class path feeds which, directly along the residual stream.

A node of an earlier layer adds :math:`\Delta x = \bar w\, W_{:,p}` to the stream of the scoped tokens. What a node
:math:`q` of a later layer makes of that, and the answer :math:`F` of it, is to first order

.. math:: e_{p \to q} = \frac{\partial F}{\partial w_q} \; \frac{\partial w_q}{\partial x} \, \Delta x_p

with :math:`x` the stream that the later layer reads. It leaves out what layers between the two make of the first. All
edges of an image come from one forward pass, one backward pass, and one through each layer by itself.

Letters: B images of a batch, N tokens, T scoped tokens, D embedding width, P nodes of a path (layer by layer).

Source:
    Edge attribution patching, Syed et al. (arXiv:2310.10348), between single neurons, with removal for the corruption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from vitprune.data import Batches, on_device
from vitprune.discovery.discover import Discovery, class_paths
from vitprune.discovery.objective import make_objective
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.path_layers import ATTENTION, find_path_layers
from vitprune.models.trunk import check_trunk, resolve_scope, scale_branch, scope_slice
from vitprune.models.units import Group, capture, frozen, hook_hidden
from vitprune.progress import Track, untracked
from vitprune.sharing import refuse_sharing

# Edges that are cut one by one, to compare with.
NUM_EXACT = 100


@dataclass(frozen=True)
class Edges:
    """Edges of class paths.

    Attributes:
        nodes: class index -> (layer name, node) of its path, layer by layer.
        scores: class index -> float64 [P, P]; row: from, column: to. Mean over the class's images of what the answer
            gains by the edge, to first order; 0 within a layer and backwards.
        agreement: rank correlation (Spearman) of single edges of single images with what is lost when just that edge is
            cut; None where fewer than three were cut.
        num_exact: edges that were cut.
    """

    nodes: Mapping[int, tuple[tuple[str, int], ...]]
    scores: Mapping[int, Tensor]
    agreement: float | None
    num_exact: int


@entry
def measure_edges(
    model: nn.Module,
    batches: Batches,
    found: Discovery,
    *,
    num_exact: int = NUM_EXACT,
    seed: int = 0,
    track: Track = untracked,
) -> Edges:
    """Measure the edges between the nodes of every class's path, on images of the class.

    Args:
        model: timm Vision Transformer with an isotropic trunk, in eval mode.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels of classes
            in ``found``. Read once.
        found: whose class paths; at whose tokens, and for whose answer.
        num_exact: edges to cut one by one, spread over the batches.
        seed: of which these are.
        track: wraps (items, description), for progress.

    Raises:
        VitpruneError: if the model has no isotropic trunk, there are no images, or an image is of another class.

    >>> import timm
    >>> from vitprune import discover
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4]))]
    >>> edges = measure_edges(model, batches, discover(model, batches), num_exact=0)
    >>> edges.scores[0].shape, bool(edges.scores[0].tril().any())
    (torch.Size([2, 2]), False)
    """
    refuse_sharing("the experiment edges", "make it on one process")
    layers = find_path_layers(model, found.nodes)
    scope = scope_slice(model, resolve_scope(model, found.tokens))
    objective = make_objective(found.target, found.quantity, num_classes=model.num_classes)
    paths = class_paths(found)
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    pairs: list[tuple[float, float]] = []
    generator = torch.Generator().manual_seed(seed)
    checked = False
    for images, labels in on_device(model, track(batches, "edges")):
        if not checked:
            check_trunk(model, layers, images)
            checked = True
        absent = [int(label) for label in labels if int(label) not in paths]
        if absent:
            raise VitpruneError(f"class {absent[0]} has images but no path in the run; choose with `classes`")
        nodes_BLK = torch.stack([paths[int(label)] for label in labels]).to(images.device)
        with frozen(model):
            course = _Course.run(model, layers, images, labels, objective, scope)
            edges_BPP = course.edges(nodes_BLK).double().cpu()
            # Some of every batch, as long as there are any to cut.
            wanted = min(num_exact - len(pairs), max(1, num_exact // 10))
            for image, start, end in _draw(edges_BPP, wanted, generator):
                pairs.append((float(edges_BPP[image, start, end]), course.cut(image, nodes_BLK[image], start, end)))
        for label, edges_PP in zip(labels.tolist(), edges_BPP, strict=True):
            sums[label] = sums[label] + edges_PP if label in sums else edges_PP
            counts[label] = counts.get(label, 0) + 1
    if not sums:
        raise VitpruneError("no images to measure edges on")
    named = {
        index: tuple(
            (name, int(node)) for name, of in zip(found.layers, paths[index].tolist(), strict=True) for node in of
        )
        for index in sums
    }
    agreement = float(spearmanr(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else None
    scores = {index: sums[index] / counts[index] for index in sorted(sums)}
    return Edges({index: named[index] for index in scores}, scores, agreement, len(pairs))


def _draw(edges_BPP: Tensor, count: int, generator: torch.Generator) -> list[tuple[int, int, int]]:
    """Draw edges of images, half of them among the largest tenth: most others are next to nothing."""
    present = edges_BPP.nonzero().tolist()
    if count <= 0 or not present:
        return []
    by_size = sorted(present, key=lambda place: -abs(float(edges_BPP[tuple(place)])))
    pools = (by_size[: max(1, len(by_size) // 10)], by_size)
    drawn = []
    for number in range(count):
        pool = pools[number % 2]
        drawn.append(tuple(pool[int(torch.randint(len(pool), (1,), generator=generator))]))
    return drawn


@dataclass(frozen=True)
class _Course:
    """A clean pass over some images, with what edges are made of.

    Attributes:
        streams: per layer the residual stream that its branch reads [B, N, D].
        hidden: per layer what its output projection reads at the scoped tokens [B, T, H].
        slopes: per layer dF/d(that) [B, T, H].
        args: per layer the other arguments of its block.
    """

    model: nn.Module
    layers: Sequence[Group]
    images: Tensor
    objective: object
    classes_B: Tensor
    scope: slice
    streams: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]
    args: tuple[tuple[tuple, dict], ...]

    @classmethod
    def run(cls, model, layers, images, labels, objective, scope) -> _Course:
        streams: dict[str, Tensor] = {}
        block_args: dict[str, tuple[tuple, dict]] = {}
        handles = []

        def keep_stream(name: str):
            return lambda _module, inputs: streams.update({name: inputs[0].detach()})

        def keep_args(name: str):
            return lambda _block, args, kwargs: block_args.update({name: (args[1:], kwargs)})

        try:
            for layer in layers:
                block = model.get_submodule(_block_of(layer))
                norm = block.norm1 if layer.kind == ATTENTION else block.norm2
                handles.append(norm.register_forward_pre_hook(keep_stream(layer.name)))
                handles.append(block.register_forward_pre_hook(keep_args(layer.name), with_kwargs=True))
            with capture(model, layers) as captured:
                logits = model(images)
                classes_B = objective.classes(labels, logits.detach())
                value = objective.value(logits, classes_B).sum()
                slopes = torch.autograd.grad(value, [captured[layer.name] for layer in layers])
        finally:
            for handle in handles:
                handle.remove()
        return cls(
            model,
            layers,
            images,
            objective,
            classes_B,
            scope,
            tuple(streams[layer.name] for layer in layers),
            tuple(captured[layer.name].detach()[:, scope] for layer in layers),
            tuple(slope[:, scope] for slope in slopes),
            tuple(block_args[layer.name] for layer in layers),
        )

    def added(self, layer: int, nodes_BK: Tensor) -> Tensor:
        """Return what each of some nodes adds to the stream of the scoped tokens [B, K, T, D]."""
        each = self.layers[layer]
        branch = 1 if each.kind == ATTENTION else 2
        columns_BKD = self.model.get_submodule(each.read_by).weight.T[nodes_BK]
        own_BTK = self.hidden[layer].gather(2, nodes_BK.unsqueeze(1).expand(-1, self.hidden[layer].shape[1], -1))
        out_BKTD = own_BTK.transpose(1, 2).unsqueeze(3) * columns_BKD.unsqueeze(2)
        return scale_branch(self.model.get_submodule(_block_of(each)), branch, out_BKTD)

    def respond(self, layer: int, stream_BND: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return what a layer's output projection reads at the scoped tokens if its branch reads this stream."""
        each = self.layers[layer]
        block = self.model.get_submodule(_block_of(each))
        kept: list[Tensor] = []
        with hook_hidden(self.model, [each], lambda _name, h_BNH: kept.append(h_BNH)):
            if each.kind == ATTENTION:
                args, kwargs = self.args[layer]
                block.attn(block.norm1(stream_BND), *args, **kwargs)
            else:
                block.mlp(block.norm2(stream_BND))
        return kept[0][:, self.scope]

    def edges(self, nodes_BLK: Tensor) -> Tensor:
        """Return the edges of every image [B, P, P], P = L K."""
        num_layers, top_k = nodes_BLK.shape[1:]
        added = [self.added(layer, nodes_BLK[:, layer]) for layer in range(num_layers)]
        edges_BPP = self.images.new_zeros((len(self.images), num_layers * top_k, num_layers * top_k))
        for rank in range(top_k):
            leaves, total = [], 0.0
            with torch.enable_grad():
                for layer in range(num_layers):
                    leaf_BND = self.streams[layer].clone().requires_grad_()
                    nodes_BT1 = nodes_BLK[:, layer, rank].view(-1, 1, 1).expand(-1, self.hidden[layer].shape[1], 1)
                    responses_BT1 = self.respond(layer, leaf_BND).gather(2, nodes_BT1)
                    total = total + (self.slopes[layer].gather(2, nodes_BT1) * responses_BT1).sum()
                    leaves.append(leaf_BND)
                pulled = torch.autograd.grad(total, leaves)
            for end in range(num_layers):
                reads_BTD = pulled[end][:, self.scope]
                for start in range(end):
                    place = slice(start * top_k, (start + 1) * top_k)
                    gained_BK = (added[start] * reads_BTD.unsqueeze(1)).sum((2, 3))
                    edges_BPP[:, place, end * top_k + rank] = gained_BK.detach()
        return edges_BPP

    @torch.no_grad()
    def cut(self, image: int, nodes_LK: Tensor, start: int, end: int) -> float:
        """Return what the answer to one image loses when one edge is cut, all else free."""
        top_k = nodes_LK.shape[1]
        one = slice(image, image + 1)
        (from_layer, from_rank), (to_layer, to_rank) = divmod(start, top_k), divmod(end, top_k)
        added_1TD = self.added(from_layer, nodes_LK[from_layer].expand(len(self.images), -1))[image, from_rank]
        stream_1ND = self.streams[to_layer][one].clone()
        stream_1ND[0, self.scope] -= added_1TD
        node = int(nodes_LK[to_layer, to_rank])
        changed_T = self.respond(to_layer, stream_1ND)[0, :, node]

        def write(_name: str, h_1NH: Tensor) -> Tensor:
            h_1NH = h_1NH.clone()
            h_1NH[0, self.scope, node] = changed_T
            return h_1NH

        classes_1 = self.classes_B[one]
        clean = self.objective.value(self.model(self.images[one]), classes_1)
        with hook_hidden(self.model, [self.layers[to_layer]], write):
            return float(clean - self.objective.value(self.model(self.images[one]), classes_1))


def _block_of(layer: Group) -> str:
    return layer.name.rpartition(".")[0]
