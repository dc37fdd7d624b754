r"""Layer-progressive search by joint attribution score, with every forward pass shared that can be shared.

The search (arXiv:2503.09046) clamps the scoped hidden vectors w_l of the layers already searched to their clean values
w̄_l with the selected neurons scaled by α, scales the whole vector of the next layer by α, and integrates the gradient
of the class probability over α. Three facts make it cheap without changing a number:

* The states that enter layer l do not depend on the layer under test, so they advance one block per layer. At a
  clamped layer the FFN of the scoped tokens is known beforehand: only the free tokens compute theirs.
* The gradient with respect to the selected neurons is needed along one direction only. With one scoped token that
  direction is a tangent carried forward with the states; with several, one backward pass through the prefix yields it
  per token.
* Only the suffix behind the layer under test needs a forward and a backward pass, and in the last block only the
  tokens that the head reads.

A path goes through FFNs, and where it is asked for through attention as well: the vector that an attention's output
projection reads is clamped and scaled like a hidden vector, at the scoped tokens. A block is two branches, each added
to the residual stream; the branches have positions 0, 1, 2, ..: attention of block 0, its FFN, attention of block 1, ..
What lies between two layers of the path runs free.

An adaptive rule takes further nodes where the first ones leave in doubt which neurons are the best (``find_doubtful``):
for those images and that layer alone, by going through the blocks before it again.

Letters: B images, F some of them, N tokens, T scoped tokens, D embedding width, H nodes of a layer, L layers of the
path, K selected nodes per layer, Q quadrature nodes, R = Q*B rows (node-major). Tensors without an H at the end that
start with R may have B rows only while all nodes still share one state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from vitprune.discovery.best import best_neurons, find_doubtful
from vitprune.discovery.objective import Objective
from vitprune.discovery.precision import products_in
from vitprune.discovery.quadrature import Quadrature
from vitprune.discovery.search import Search
from vitprune.discovery.tangents import LeanTangents
from vitprune.models.path_layers import ATTENTION
from vitprune.models.trunk import (
    CleanPass,
    attend,
    attend_first,
    can_attend_first,
    head,
    record_clean,
    scale_branch,
    scope_slice,
)
from vitprune.models.units import Group
from vitprune.views import num_tokens_read

# Rows that run through the suffix at once: enough to fill a CPU's matrix units, few enough to stay near its caches.
CHUNK_ROWS = 32

# How small a margin is in doubt: against its spread over the nodes of the first rule, and against its change from one
# rule to the next. benchmarks/discovery.py measures what they leave wrong.
NODE_DOUBT, RULE_DOUBT = 0.1, 0.5
# What a lower precision leaves uncertain of a margin, in standard deviations of a layer's scores. TF32 has three bits
# more than bf16.
NOISE = {"tf32": 0.0125, "bf16": 0.1}


@dataclass(frozen=True)
class PathBatch:
    """Paths of a batch of images.

    Attributes:
        neurons_BLK: int64; the selected nodes of each layer, best first.
        joint_scores_B: joint attribution score of the whole path (float, the model's dtype).
        completeness_errors_B: abs(integral - (F(1) - F(0))) for the complete variant, else None.
        scores: per layer, score_l[i] of every node [B, H].
        logits_BC: the model's undisturbed answer.
    """

    neurons_BLK: Tensor
    joint_scores_B: Tensor
    completeness_errors_B: Tensor | None
    scores: tuple[Tensor, ...]
    logits_BC: Tensor


def search_paths(
    model: nn.Module,
    search: Search,
    images: Tensor,
    labels: Tensor,
    *,
    chunk_rows: int = CHUNK_ROWS,
    complete: bool = False,
) -> PathBatch:
    r"""Find each image's path, layer by layer.

    .. math::
        \mathrm{score}_l[i] = \Big(\bar w_{l,i} + \sum_{l'<l} \sum_{p \in S_{l'}} \bar w_{l',p}\Big)
            \Big(G_l[i] + \sum_{l'<l} \sum_{p \in S_{l'}} G_{l'}[p]\Big), \qquad
        G_l[i] = \int_0^1 \frac{\partial F(\alpha)}{\partial w_{l,i}} d\alpha

    With several scoped tokens the product is taken per token and averaged over the tokens.

    Args:
        model: timm Vision Transformer with an isotropic trunk (``check_trunk``), in eval mode.
        search: what is asked for.
        images: [B, 3, height, width], normalised by the model's own transform; any mix of classes.
        labels: int64 [B]; each image's class, for an objective that asks for it.
        chunk_rows: images x nodes that run through the suffix at once; changes memory, not results.
        complete: use the variant that obeys completeness, :math:`\sum_p \bar w_p \int \partial F / \partial w_p`
            (summed over tokens) in place of the product of sums.

    Source:
        arXiv:2503.09046, section 3. There only the last of K neurons of each earlier layer enters the sums; here all
        do. For K = 1 the two agree.
    """
    one_token = scope_slice(model, search.tokens) == slice(0, 1)
    rules, first = search.rule.rules(), first_rule(search.rule, one_token=one_token)
    course = _Course.begin(model, search, images, labels, nodes=first.nodes, complete=complete, chunk_rows=chunk_rows)
    course = replace(course, precision=search.precision)
    layers = search.layers
    neurons: list[Tensor] = []
    scores: list[Tensor] = []
    with course.grad_mode():
        prefix = course.start()
        for index in range(len(layers)):
            layer = _enter(model, course, index, prefix)
            score_BH = _score(model, layers, course, rules, neurons, layer, search.top_k)
            best_BK = best_neurons(score_BH, search.top_k)
            prefix = _advance(model, layers, course, index, layer, best_BK)
            scores.append(score_BH)
            neurons.append(best_BK)
        neurons_BLK = torch.stack(neurons, 1)
        if complete:
            joint_B, errors_B = _complete_joint_score(
                model, layers, course, neurons_BLK, first_rule(search.rule, one_token=False)
            )
        else:
            joint_B, errors_B = _joint_score(model, course, prefix, first.weights), None
    return PathBatch(neurons_BLK, joint_B, errors_B, tuple(scores), course.clean.logits_BC)


def first_rule(quadrature: Quadrature, *, one_token: bool) -> Quadrature:
    """Return the rule that a search starts with.

    Scaling the FFN of several tokens bends F more: the first nodes of an adaptive rule would not notice their errors.
    """
    return quadrature if one_token or quadrature.finer is None else quadrature.finer


def score_paths(
    model: nn.Module,
    search: Search,
    images: Tensor,
    labels: Tensor,
    neurons_BLK: Tensor,
    *,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    r"""Return the joint attribution score [B] of given paths.

    .. math:: \mathrm{JAS}(P) = \Big(\sum_{p \in P} \bar w_p\Big) \int_0^1 \sum_{p \in P}
        \frac{\partial F(\alpha)}{\partial w_p} d\alpha

    Arguments as in ``search_paths``; ``neurons_BLK`` is int64 [B, L, K].

    Source:
        arXiv:2503.09046, definition 3.1.
    """
    course = _Course.begin(model, search, images, labels, complete=False, chunk_rows=chunk_rows)
    with course.grad_mode():
        prefix = _walk(model, search.layers, course, neurons_BLK.unbind(1))
        return _joint_score(model, course, prefix, search.rule.weights)


def score_alone(
    model: nn.Module, search: Search, images: Tensor, labels: Tensor, *, chunk_rows: int = CHUNK_ROWS
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return each layer's scores [B, H] joined with no other one, by the variant that obeys completeness; and logits.

    Arguments as in ``search_paths``.
    """
    course = _Course.begin(model, search, images, labels, complete=True, chunk_rows=chunk_rows)
    clean, layers = course.clean, search.layers
    scores = []
    with torch.no_grad():
        prefix = course.start()
        for index, each in enumerate(layers):
            layer = _enter(model, course, index, prefix)
            scores.append(_integrate(_score_nodes(model, layers, course, index, layer), search.rule.weights))
            prefix = _leave(layer, model.get_submodule(each.read_by)(clean.hidden_BTH[index]), None)
    return tuple(scores), clean.logits_BC


@dataclass(frozen=True)
class _Course:
    """What stays the same on the way through the blocks.

    Attributes:
        clean: the undisturbed pass.
        classes_B: int64; the class that each image's F is of.
        nodes: values of α.
        objective: what F is.
        positions: of the layers of the path among the branches.
        scope: ``cls``, ``patch`` or ``all``.
        complete: whether layers are scored by the variant that obeys completeness.
        chunk_rows: rows in one graph of the suffix.
        precision: of the matrix products there, key of ``PRECISIONS``.
    """

    clean: CleanPass
    classes_B: Tensor
    nodes: tuple[float, ...]
    objective: Objective
    positions: tuple[int, ...]
    scope: str
    complete: bool
    chunk_rows: int
    precision: str = "float32"

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        search: Search,
        images: Tensor,
        labels: Tensor,
        *,
        complete: bool,
        chunk_rows: int,
        nodes: tuple[float, ...] | None = None,
    ) -> _Course:
        """Run the model once undisturbed; None takes the nodes of the search's own rule."""
        clean = record_clean(model, search.layers, images, tokens=scope_slice(model, search.tokens))
        classes_B = search.objective.classes(labels, clean.logits_BC)
        nodes = search.rule.nodes if nodes is None else nodes
        positions = tuple(map(_position, search.layers))
        return cls(clean, classes_B, nodes, search.objective, positions, search.tokens, complete, chunk_rows)

    @property
    def one_token(self) -> bool:
        return self.clean.hidden_BTH[0].shape[1] == 1

    def grad_mode(self):
        """Several scoped tokens need a graph of the prefix, one does not."""
        return torch.no_grad() if self.one_token else torch.enable_grad()

    def start(self) -> _Prefix:
        return _Prefix(self.clean.stem_BND, None, (), torch.zeros_like(self.clean.hidden_BTH[0][..., :1]))

    def alphas(self) -> Tensor:
        """Return α [Q, 1, 1, 1]."""
        stem_BND = self.clean.stem_BND
        return torch.tensor(self.nodes, dtype=stem_BND.dtype, device=stem_BND.device).view(-1, 1, 1, 1)

    def only(self, rows_F: Tensor, nodes: tuple[float, ...]) -> _Course:
        """Return the same for some of the images, at other nodes, in the model's own precision."""
        clean = CleanPass(
            self.clean.stem_BND[rows_F],
            self.clean.block_args,
            tuple(w_BTH[rows_F] for w_BTH in self.clean.hidden_BTH),
            self.clean.logits_BC[rows_F],
        )
        return replace(self, clean=clean, classes_B=self.classes_B[rows_F], nodes=nodes, precision="float32")


@dataclass(frozen=True)
class _Prefix:
    """States that enter a layer, with the derivative along the selected neurons.

    One scoped token: ``tangent_RND`` is the derivative of x when every selected neuron moves (None: no neuron yet).
    Several: ``x_RND`` is an autograd graph over ``probes`` (zeros [R, T, D] added to each clamped layer's output), each
    with the direction [R, T, D] in which the selected neurons move that output. ``selected_BT1`` is the sum of the
    selected neurons' clean activations.
    """

    x_RND: Tensor
    tangent_RND: Tensor | None
    probes: tuple[tuple[Tensor, Tensor], ...]
    selected_BT1: Tensor


@dataclass(frozen=True)
class _Layer:
    """A branch where it joins: the residual stream, what the branch adds to free tokens, and their tangents."""

    block: nn.Module
    branch: int
    prefix: _Prefix
    mid_RND: Tensor
    free_RND: Tensor
    mid_tangent_RND: Tensor | None
    free_tangent_RND: Tensor | None
    tokens: slice


def _position(layer: Group) -> int:
    """Return the position of a layer among the branches; its name is that of timm, ``blocks.3.mlp``."""
    return 2 * int(layer.name.split(".")[1]) + (layer.kind != ATTENTION)


def _score(model, layers, course: _Course, rules: Sequence[Quadrature], neurons, layer: _Layer, top_k: int) -> Tensor:
    """Return the scores of a layer [B, H], by as many of the rules as settle which K neurons are the best.

    The layer is the one after ``neurons``, at the nodes of one of the rules: the coarsest to be taken.
    """
    score_QFH = _score_nodes(model, layers, course, len(neurons), layer)
    rows_F = torch.arange(score_QFH.shape[1], device=score_QFH.device)
    (start,) = (level for level, rule in enumerate(rules) if rule.nodes == course.nodes)
    score_BH = _integrate(score_QFH, rules[start].weights)
    if course.precision != "float32":
        rows_F = _find_unsettled(rules, start, score_BH, score_QFH, top_k, noise=NOISE[course.precision])
        if len(rows_F) == 0:
            return score_BH
        score_QFH = _score_more_nodes(model, layers, course, rows_F, course.nodes, neurons)
    for level, rule in enumerate(rules[start:], start):
        if len(rule.nodes) > len(score_QFH):
            more_nodes = rule.nodes[len(score_QFH) :]
            more_QFH = _score_more_nodes(model, layers, course, rows_F, more_nodes, neurons)
            score_QFH = torch.cat([score_QFH, more_QFH])
        score_FH = _integrate(score_QFH, rule.weights)
        score_BH[rows_F] = score_FH
        if rule is rules[-1]:
            break
        unsettled = _find_unsettled(rules, level, score_FH, score_QFH, top_k, noise=0)
        if len(unsettled) == 0:
            break
        rows_F, score_QFH = rows_F[unsettled], score_QFH[:, unsettled]
    return score_BH


def _find_unsettled(
    rules: Sequence[Quadrature], level: int, score_BH, score_QBH, top_k: int, *, noise: float
) -> Tensor:
    """Return the images whose K best neurons a rule leaves in doubt, given scores by it and by each of its nodes."""
    if level == 0:
        return find_doubtful(score_BH, score_QBH, top_k, share=NODE_DOUBT, noise=noise)
    coarser = rules[level - 1]
    coarser_BH = _integrate(score_QBH[: len(coarser.nodes)], coarser.weights)
    return find_doubtful(score_BH, torch.stack([coarser_BH, score_BH]), top_k, share=RULE_DOUBT, noise=noise)


def _score_more_nodes(model, layers, course: _Course, rows_F: Tensor, nodes: tuple[float, ...], neurons) -> Tensor:
    """Return scores [nodes, F, H] of some images in the layer after ``neurons``, at nodes that the course lacks."""
    room = len(course.classes_B) * len(course.nodes)  # rows at once, as many as the course itself has
    at_once = min(room, len(nodes))
    scores = []
    for start in range(0, len(nodes), at_once):
        parts = []
        for part_F in rows_F.split(room // at_once):
            few = course.only(part_F, nodes[start : start + at_once])
            prefix = _walk(model, layers, few, [best_BK[part_F] for best_BK in neurons])
            layer = _enter(model, few, len(neurons), prefix)
            parts.append(_score_nodes(model, layers, few, len(neurons), layer))
        scores.append(torch.cat(parts, 1))
    return torch.cat(scores)


def _walk(model, layers, course: _Course, neurons_LBK: Sequence[Tensor]) -> _Prefix:
    """Go through the first layers with given nodes."""
    prefix = course.start()
    for index, best_BK in enumerate(neurons_LBK):
        prefix = _advance(model, layers, course, index, _enter(model, course, index, prefix), best_BK)
    return prefix


def _score_nodes(model, layers, course: _Course, index: int, layer: _Layer) -> Tensor:
    """Return the scores that each value of α alone would give [Q, B, H]; they are linear in the gradient."""
    down, w_BTH = model.get_submodule(layers[index].read_by), course.clean.hidden_BTH[index]
    cut = _leave(layer, down(course.alphas() * w_BTH).flatten(0, 1), None)
    grad_RND, _ = _suffix_gradient(model, course, course.positions[index], cut.x_RND)
    slope_RTD = scale_branch(layer.block, layer.branch, grad_RND[:, layer.tokens])
    before_RT1 = _prefix_gradient(cut, grad_RND)
    scores = []
    for slope_BTD, before_BT1 in zip(*(each.chunk(len(course.nodes)) for each in (slope_RTD, before_RT1)), strict=True):
        along_BTH = slope_BTD @ down.weight
        if course.complete:
            scores.append((w_BTH * along_BTH + before_BT1).sum(1))
        else:
            scores.append(((w_BTH + layer.prefix.selected_BT1) * (along_BTH + before_BT1)).mean(1))
    return torch.stack(scores).detach()


def _advance(model, layers, course: _Course, index: int, layer: _Layer, best_BK: Tensor) -> _Prefix:
    """Clamp a layer with its selected nodes scaled by α."""
    down, w_BTH = model.get_submodule(layers[index].read_by), course.clean.hidden_BTH[index]
    chosen_BTK = w_BTH.gather(-1, best_BK.unsqueeze(1).expand(-1, w_BTH.shape[1], -1))
    columns_BKD = down.weight.T[best_BK]
    scaled_BTD = chosen_BTK @ columns_BKD
    out_QBTD = down(w_BTH) + (course.alphas() - 1) * scaled_BTD
    direction_BTD = scaled_BTD if course.complete else columns_BKD.sum(1, keepdim=True).expand_as(scaled_BTD)
    left = _leave(layer, out_QBTD.flatten(0, 1), direction_BTD.repeat(len(course.nodes), 1, 1))
    return replace(left, selected_BT1=layer.prefix.selected_BT1 + chosen_BTK.sum(-1, keepdim=True))


def _joint_score(model, course: _Course, prefix: _Prefix, weights: tuple[float, ...]) -> Tensor:
    """Return the product of sums, a mean over the scoped tokens [B]."""
    total_BT1, _ = _integrate_end(model, course, prefix, weights)
    return (prefix.selected_BT1 * total_BT1).mean((1, 2)).detach()


def _complete_joint_score(
    model, layers, course: _Course, neurons_BLK: Tensor, rule: Quadrature
) -> tuple[Tensor, Tensor]:
    """Return the sum of products [B], and how far it is from F(1) - F(0) [B]."""
    course = replace(course, nodes=(*rule.nodes, 0.0, 1.0))
    prefix = _walk(model, layers, course, neurons_BLK.unbind(1))
    total_BT1, value_QB = _integrate_end(model, course, prefix, (*rule.weights, 0.0, 0.0))
    joint_B = total_BT1.sum((1, 2)).detach()
    return joint_B, (joint_B - (value_QB[-1] - value_QB[-2])).abs()


def _integrate_end(model, course: _Course, prefix: _Prefix, weights: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return the integral of dF along all selected neurons, per scoped token [B, T or 1, 1], and F at nodes [Q, B]."""
    course = replace(course, precision="float32")
    grad_RND, value_R = _suffix_gradient(model, course, course.positions[-1], prefix.x_RND)
    along_RT1 = _prefix_gradient(prefix, grad_RND)
    return _integrate(along_RT1.unflatten(0, (len(weights), -1)), weights), value_R.view(len(weights), -1)


def _enter(model, course: _Course, index: int, prefix: _Prefix) -> _Layer:
    position, start = course.positions[index], course.positions[index - 1] + 1 if index else 0
    block, branch = model.blocks[position // 2], position % 2 + 1
    tokens = scope_slice(model, course.scope)

    def run(x_RND: Tensor) -> tuple[Tensor, Tensor]:
        for between in range(start, position):
            x_RND = _run_branch(model, course, between, x_RND)
        return _run_free(model, course, position, x_RND)

    if prefix.tangent_RND is None:
        mid_RND, free_RND = run(prefix.x_RND)
        return _Layer(block, branch, prefix, mid_RND, free_RND, None, None, tokens)
    with forward_ad.dual_level(), LeanTangents():
        mid, free = run(forward_ad.make_dual(prefix.x_RND, prefix.tangent_RND))
        (mid_RND, mid_tangent), (free_RND, free_tangent) = forward_ad.unpack_dual(mid), forward_ad.unpack_dual(free)
    return _Layer(block, branch, prefix, mid_RND, free_RND, mid_tangent, free_tangent, tokens)


def _run_branch(model, course: _Course, position: int, x_RND: Tensor) -> Tensor:
    """Run a branch that is no layer of the path."""
    block, args = model.blocks[position // 2], course.clean.block_args[position // 2]
    if position % 2:
        return x_RND + scale_branch(block, 2, block.mlp(block.norm2(x_RND)))
    num_read = _num_read(model, course, position)
    return attend_first(block, x_RND, num_read) if num_read and can_attend_first(block) else attend(block, x_RND, args)


def _run_free(model, course: _Course, position: int, x_RND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the residual stream that a layer of the path is added to, and what it adds to the free tokens."""
    block, args = model.blocks[position // 2], course.clean.block_args[position // 2]
    tokens = scope_slice(model, course.scope)
    if position % 2:
        return x_RND, scale_branch(block, 2, block.mlp(block.norm2(_free_part(x_RND, tokens))))
    read_RND = x_RND[:, : _num_read(model, course, position)]
    if _free_part(read_RND, tokens).shape[1] == 0:
        return read_RND, read_RND[:, :0]
    added_RND = scale_branch(block, 1, block.attn(block.norm1(x_RND), *args[0], **args[1]))
    return read_RND, _free_part(added_RND[:, : read_RND.shape[1]], tokens)


def _num_read(model, course: _Course, position: int) -> int | None:
    """Return how many of the first tokens matter from a branch on; None: all of them."""
    in_last = position // 2 == len(model.blocks) - 1
    return num_tokens_read(model) if in_last and course.scope == "cls" else None


def _free_part(x_RND: Tensor, tokens: slice) -> Tensor:
    """Return the tokens that are not scoped, which are all before the scoped ones or all after them."""
    start, stop, _ = tokens.indices(x_RND.shape[1])
    before, after = x_RND[:, :start], x_RND[:, stop:]
    return before if after.shape[1] == 0 else after


def _leave(layer: _Layer, out_RTD: Tensor, direction_RTD: Tensor | None) -> _Prefix:
    """Put the output of a clamped layer in the scoped tokens' place.

    ``direction_RTD`` is how the selected nodes of this layer move that output; None if the output is fixed.
    """
    block, branch = layer.block, layer.branch
    several = layer.mid_tangent_RND is None and out_RTD.shape[1] > 1
    probes = layer.prefix.probes
    if several and direction_RTD is not None:
        probe_RTD = torch.zeros_like(out_RTD, requires_grad=True)
        probes, out_RTD = (*probes, (probe_RTD, direction_RTD)), out_RTD + probe_RTD
    x_RND = _assemble(layer.mid_RND, scale_branch(block, branch, out_RTD), layer.free_RND, layer.tokens)
    if several or (layer.mid_tangent_RND is None and direction_RTD is None):
        return _Prefix(x_RND, None, probes, layer.prefix.selected_BT1)
    moved_RTD = torch.zeros_like(out_RTD) if direction_RTD is None else scale_branch(block, branch, direction_RTD)
    if layer.mid_tangent_RND is None:
        tangent_RND = _assemble(torch.zeros_like(x_RND), moved_RTD, torch.zeros_like(layer.free_RND), layer.tokens)
    else:
        tangent_RND = _assemble(layer.mid_tangent_RND, moved_RTD, layer.free_tangent_RND, layer.tokens)
    return _Prefix(x_RND, tangent_RND, probes, layer.prefix.selected_BT1)


def _assemble(mid_RND: Tensor, scoped_RTD: Tensor, free_RND: Tensor, tokens: slice) -> Tensor:
    """Add a layer's outputs to the residual stream; shared states (B rows) are repeated to R rows here."""
    repeats = len(scoped_RTD) // len(mid_RND)
    free_RND = free_RND.repeat(len(scoped_RTD) // len(free_RND), 1, 1)
    scoped_first = tokens.indices(mid_RND.shape[1])[0] == 0
    parts = (scoped_RTD, free_RND) if scoped_first else (free_RND, scoped_RTD)
    return mid_RND.repeat(repeats, 1, 1) + torch.cat(parts, dim=1)


def _suffix_gradient(model, course: _Course, position: int, x_RND: Tensor) -> tuple[Tensor, Tensor]:
    """Return dF/dx behind the branch at ``position`` [R, N, D] and F [R]; a few rows at a time."""
    gradients, values = [], []
    num_read = num_tokens_read(model)
    begun = None if position % 2 else model.blocks[position // 2]
    rest = list(zip(model.blocks, course.clean.block_args, strict=True))[position // 2 + 1 :]
    classes_R = course.classes_B.repeat(len(course.nodes))
    split = (x_RND.detach().split(course.chunk_rows), classes_R.split(course.chunk_rows))
    for rows, classes in zip(*split, strict=True):
        with torch.enable_grad(), products_in(course.precision, rows.device):
            leaf = x = rows.clone().requires_grad_()
            if begun is not None:
                x = x if rest else x[:, :num_read]
                x = x + scale_branch(begun, 2, begun.mlp(begun.norm2(x)))
            for place, (block, args) in enumerate(rest):
                if place == len(rest) - 1 and num_read and can_attend_first(block):
                    mid = attend_first(block, x, num_read)
                    x = mid + scale_branch(block, 2, block.mlp(block.norm2(mid)))
                else:
                    x = block(x, *args[0], **args[1])
            value = course.objective.value(head(model, x), classes)
            gradients.append(torch.autograd.grad(value.sum(), leaf)[0])
            values.append(value.detach())
    return torch.cat(gradients), torch.cat(values)


def _prefix_gradient(prefix: _Prefix, grad_RND: Tensor) -> Tensor:
    """Return dF along the selected nodes of all earlier layers, per scoped token [R, T or 1, 1]."""
    if prefix.tangent_RND is not None:
        return (grad_RND * prefix.tangent_RND).sum((1, 2)).view(-1, 1, 1)
    if not prefix.probes:
        return grad_RND.new_zeros(len(grad_RND), 1, 1)
    probes, directions = zip(*prefix.probes, strict=True)
    pulled = torch.autograd.grad(prefix.x_RND, probes, grad_outputs=grad_RND, retain_graph=True)
    return sum((pull * direction).sum(-1, keepdim=True) for pull, direction in zip(pulled, directions, strict=True))


def _integrate(values_Q: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Sum [Q, ...] with the quadrature weights -> [...]."""
    return torch.tensordot(torch.tensor(weights, dtype=values_Q.dtype, device=values_Q.device), values_Q, dims=1)
