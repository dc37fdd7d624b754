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

Letters: B images, N tokens, T scoped tokens, D embedding width, H hidden neurons, L FFNs, K neurons per FFN,
Q quadrature nodes, R = Q*B rows (node-major). Tensors without an H at the end that start with R may have B rows only
while all nodes still share one state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from vitprune.discovery.objective import DEFAULT_OBJECTIVE, Objective
from vitprune.discovery.quadrature import Quadrature
from vitprune.discovery.trunk import (
    CleanPass,
    attend,
    attend_first,
    can_attend_first,
    head,
    num_tokens_read,
    plain_attention,
    record_clean,
    scale_branch,
    scope_slice,
)
from vitprune.feed_forward import FeedForward

# Rows that run through the suffix at once: enough to fill a CPU's matrix units, few enough to stay near its caches.
CHUNK_ROWS = 32


@dataclass(frozen=True)
class PathBatch:
    """Paths of a batch of images.

    Attributes:
        neurons_BLK: int64; the selected neurons of each FFN, best first.
        joint_scores_B: joint attribution score of the whole path (float, the model's dtype).
        completeness_errors_B: abs(integral - (F(1) - F(0))) for the complete variant, else None.
        scores: per FFN, score_l[i] of every neuron [B, H].
        logits_BC: the model's undisturbed answer.
    """

    neurons_BLK: Tensor
    joint_scores_B: Tensor
    completeness_errors_B: Tensor | None
    scores: tuple[Tensor, ...]
    logits_BC: Tensor


def search_paths(
    model: nn.Module,
    ffns: Sequence[FeedForward],
    images: Tensor,
    labels: Tensor,
    *,
    top_k: int,
    quadrature: Quadrature,
    scope: str,
    objective: Objective = DEFAULT_OBJECTIVE,
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
        ffns: its FFNs.
        images: [B, 3, height, width], normalised by the model's own transform; any mix of classes.
        labels: int64 [B]; each image's class, for an objective that asks for it.
        top_k: K, neurons per FFN.
        quadrature: rule for the integral over α.
        scope: ``cls``, ``patch`` or ``all``.
        objective: what F is.
        chunk_rows: images x nodes that run through the suffix at once; changes memory, not results.
        complete: use the variant that obeys completeness, :math:`\sum_p \bar w_p \int \partial F / \partial w_p`
            (summed over tokens) in place of the product of sums.

    Source:
        arXiv:2503.09046, section 3. There only the last of K neurons of each earlier layer enters the sums; here all
        do. For K = 1 the two agree.
    """
    suffix = _Suffix(objective, chunk_rows)
    return _walk(model, ffns, images, labels, top_k, None, quadrature, scope, suffix, complete)


def score_paths(
    model: nn.Module,
    ffns: Sequence[FeedForward],
    images: Tensor,
    labels: Tensor,
    neurons_BLK: Tensor,
    *,
    quadrature: Quadrature,
    scope: str,
    objective: Objective = DEFAULT_OBJECTIVE,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    r"""Return the joint attribution score [B] of given paths.

    .. math:: \mathrm{JAS}(P) = \Big(\sum_{p \in P} \bar w_p\Big) \int_0^1 \sum_{p \in P}
        \frac{\partial F(\alpha)}{\partial w_p} d\alpha

    Arguments as in ``search_paths``; ``neurons_BLK`` is int64 [B, L, K].

    Source:
        arXiv:2503.09046, definition 3.1.
    """
    top_k = neurons_BLK.shape[-1]
    suffix = _Suffix(objective, chunk_rows)
    walked = _walk(model, ffns, images, labels, top_k, neurons_BLK, quadrature, scope, suffix, False)
    return walked.joint_scores_B


def _walk(model, ffns, images, labels, top_k, given_BLK, quadrature, scope, suffix, complete) -> PathBatch:
    """Go through the blocks once: score the layer (unless its neurons are given), select, advance."""
    tokens = scope_slice(model, scope)
    nodes, node_weights = quadrature.nodes, quadrature.weights
    if complete:  # two nodes of weight 0 give F(0) and F(1)
        nodes, node_weights = (*nodes, 0.0, 1.0), (*node_weights, 0.0, 0.0)
    alphas_Q = torch.tensor(nodes, dtype=images.dtype, device=images.device)
    weights_Q = torch.tensor(node_weights, dtype=images.dtype, device=images.device)
    clean = record_clean(model, ffns, images, tokens=tokens)
    one_token = clean.hidden_BTH[0].shape[1] == 1
    classes_R = suffix.objective.classes(labels, clean.logits_BC).repeat(len(nodes))

    blocks = list(model.blocks)
    state = _Prefix(clean.stem_BND, None, ())
    selected_sum_BT1 = clean.hidden_BTH[0].new_zeros(len(images), clean.hidden_BTH[0].shape[1], 1)
    neurons, scores = [], []
    with torch.no_grad() if one_token else torch.enable_grad():
        for index, (block, ffn, w_BTH) in enumerate(zip(blocks, ffns, clean.hidden_BTH, strict=True)):
            down = model.get_submodule(ffn.down_proj)
            num_read = num_tokens_read(model) if index == len(blocks) - 1 and scope == "cls" else None
            layer = _enter(block, state, clean.block_args[index], tokens, num_read)
            if given_BLK is None:
                whole_QBTH = alphas_Q.view(-1, 1, 1, 1) * w_BTH
                cut = _leave(block, layer, down(whole_QBTH).flatten(0, 1), None)
                cut_grad_RND, _ = _suffix_gradient(model, clean, index, cut.x_RND, classes_R, suffix)
                along_BTH = _integrate(scale_branch(block, 2, cut_grad_RND[:, tokens]), weights_Q) @ down.weight
                before_BT1 = _prefix_gradient(cut, cut_grad_RND, weights_Q)
                if complete:
                    score_BH = (w_BTH * along_BTH + before_BT1).sum(1)
                else:
                    score_BH = ((w_BTH + selected_sum_BT1) * (along_BTH + before_BT1)).mean(1)
                # A stable sort breaks ties towards the lower index, whatever the device.
                best_BK = score_BH.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
                scores.append(score_BH.detach())
            else:
                best_BK = given_BLK[:, index]
            neurons.append(best_BK)

            chosen_BTK = w_BTH.gather(-1, best_BK.unsqueeze(1).expand(-1, w_BTH.shape[1], -1))
            selected_sum_BT1 = selected_sum_BT1 + chosen_BTK.sum(-1, keepdim=True)
            columns_BKD = down.weight.T[best_BK]
            scaled_BTD = chosen_BTK @ columns_BKD
            out_QBTD = down(w_BTH) + (alphas_Q - 1).view(-1, 1, 1, 1) * scaled_BTD
            direction_BTD = scaled_BTD if complete else columns_BKD.sum(1, keepdim=True).expand_as(scaled_BTD)
            state = _leave(block, layer, out_QBTD.flatten(0, 1), direction_BTD.repeat(len(nodes), 1, 1))

        last = len(blocks) - 1
        end_grad_RND, value_R = _suffix_gradient(model, clean, last, state.x_RND, classes_R, suffix)
        total_BT = _prefix_gradient(state, end_grad_RND, weights_Q).squeeze(-1)
    errors = None
    if complete:
        joint_B = total_BT.sum(1)
        value_QB = value_R.view(len(nodes), -1)
        errors = (joint_B - (value_QB[-1] - value_QB[-2])).abs()
    else:
        joint_B = (selected_sum_BT1.squeeze(-1) * total_BT).mean(1)
    return PathBatch(torch.stack(neurons, 1), joint_B.detach(), errors, tuple(scores), clean.logits_BC)


@dataclass(frozen=True)
class _Suffix:
    """What runs behind the layer under test: what F is, and how many rows at once."""

    objective: Objective
    chunk_rows: int


@dataclass(frozen=True)
class _Prefix:
    """States that enter a layer, with the derivative along the selected neurons.

    One scoped token: ``tangent_RND`` is the derivative of x when every selected neuron moves (None: no neuron yet).
    Several: ``x_RND`` is an autograd graph over ``probes`` (zeros [R, T, D] added to each clamped FFN output), each
    with the direction [R, T, D] in which the selected neurons move that output.
    """

    x_RND: Tensor
    tangent_RND: Tensor | None
    probes: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class _Layer:
    """A block up to its FFN: the residual stream, the free tokens' FFN output, and their tangents."""

    prefix: _Prefix
    mid_RND: Tensor
    free_RND: Tensor
    mid_tangent_RND: Tensor | None
    free_tangent_RND: Tensor | None
    tokens: slice


def _enter(block, prefix: _Prefix, args, tokens: slice, num_read: int | None) -> _Layer:
    def run(x_RND: Tensor) -> tuple[Tensor, Tensor]:
        if num_read and can_attend_first(block):
            mid_RND = attend_first(block, x_RND, num_read)
        else:
            mid_RND = attend(block, x_RND, args)
        before, after = _free_parts(mid_RND, tokens)
        free_RND = before if after.shape[1] == 0 else after
        return mid_RND, scale_branch(block, 2, block.mlp(block.norm2(free_RND)))

    if prefix.tangent_RND is None:
        mid_RND, free_RND = run(prefix.x_RND)
        return _Layer(prefix, mid_RND, free_RND, None, None, tokens)
    with plain_attention(block), forward_ad.dual_level():
        mid, free = run(forward_ad.make_dual(prefix.x_RND, prefix.tangent_RND))
        (mid_RND, mid_tangent), (free_RND, free_tangent) = forward_ad.unpack_dual(mid), forward_ad.unpack_dual(free)
    return _Layer(prefix, mid_RND, free_RND, mid_tangent, free_tangent, tokens)


def _free_parts(x_RND: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
    """Split off the tokens before and after the scoped ones; at most one of the two is not empty."""
    start, stop, _ = tokens.indices(x_RND.shape[1])
    return x_RND[:, :start], x_RND[:, stop:]


def _leave(block, layer: _Layer, out_RTD: Tensor, direction_RTD: Tensor | None) -> _Prefix:
    """Put a clamped FFN output in the scoped tokens' place.

    ``direction_RTD`` is how the selected neurons of this layer move that output; None if the output is fixed.
    """
    several = layer.mid_tangent_RND is None and out_RTD.shape[1] > 1
    probes = layer.prefix.probes
    if several and direction_RTD is not None:
        probe_RTD = torch.zeros_like(out_RTD, requires_grad=True)
        probes, out_RTD = (*probes, (probe_RTD, direction_RTD)), out_RTD + probe_RTD
    x_RND = _assemble(layer.mid_RND, scale_branch(block, 2, out_RTD), layer.free_RND, layer.tokens)
    if several or (layer.mid_tangent_RND is None and direction_RTD is None):
        return _Prefix(x_RND, None, probes)
    moved_RTD = torch.zeros_like(out_RTD) if direction_RTD is None else scale_branch(block, 2, direction_RTD)
    if layer.mid_tangent_RND is None:
        tangent_RND = _assemble(torch.zeros_like(x_RND), moved_RTD, torch.zeros_like(layer.free_RND), layer.tokens)
    else:
        tangent_RND = _assemble(layer.mid_tangent_RND, moved_RTD, layer.free_tangent_RND, layer.tokens)
    return _Prefix(x_RND, tangent_RND, probes)


def _assemble(mid_RND: Tensor, scoped_RTD: Tensor, free_RND: Tensor, tokens: slice) -> Tensor:
    """Add FFN outputs to the residual stream; shared states (B rows) are repeated to R rows here."""
    repeats = len(scoped_RTD) // len(mid_RND)
    free_RND = free_RND.repeat(len(scoped_RTD) // len(free_RND), 1, 1)
    scoped_first = tokens.indices(mid_RND.shape[1])[0] == 0
    parts = (scoped_RTD, free_RND) if scoped_first else (free_RND, scoped_RTD)
    return mid_RND.repeat(repeats, 1, 1) + torch.cat(parts, dim=1)


def _suffix_gradient(
    model, clean: CleanPass, index: int, x_RND: Tensor, classes_R: Tensor, suffix: _Suffix
) -> tuple[Tensor, Tensor]:
    """Return dF/dx behind block ``index`` [R, N, D] and F [R]; a few rows at a time."""
    gradients, values = [], []
    num_read = num_tokens_read(model)
    rest = list(zip(model.blocks, clean.block_args, strict=True))[index + 1 :]
    split = (x_RND.detach().split(suffix.chunk_rows), classes_R.split(suffix.chunk_rows))
    for rows, classes in zip(*split, strict=True):
        with torch.enable_grad():
            leaf = x = rows.clone().requires_grad_()
            for position, (block, args) in enumerate(rest):
                if position == len(rest) - 1 and num_read and can_attend_first(block):
                    mid = attend_first(block, x, num_read)
                    x = mid + scale_branch(block, 2, block.mlp(block.norm2(mid)))
                else:
                    x = block(x, *args[0], **args[1])
            value = suffix.objective.value(head(model, x), classes)
            gradients.append(torch.autograd.grad(value.sum(), leaf)[0])
            values.append(value.detach())
    return torch.cat(gradients), torch.cat(values)


def _prefix_gradient(prefix: _Prefix, grad_RND: Tensor, weights_Q: Tensor) -> Tensor:
    """Integrate dF along the selected neurons of all earlier layers, per scoped token [B, T, 1]."""
    if prefix.tangent_RND is not None:
        return _integrate((grad_RND * prefix.tangent_RND).sum((1, 2)), weights_Q).view(-1, 1, 1)
    if not prefix.probes:
        return grad_RND.new_zeros(1, 1, 1)
    probes, directions = zip(*prefix.probes, strict=True)
    pulled = torch.autograd.grad(prefix.x_RND, probes, grad_outputs=grad_RND, retain_graph=True)
    along_RT = sum((pull * direction).sum(-1) for pull, direction in zip(pulled, directions, strict=True))
    return _integrate(along_RT, weights_Q).unsqueeze(-1)


def _integrate(values_R: Tensor, weights_Q: Tensor) -> Tensor:
    """Sum node-major rows [Q*B, ...] with the quadrature weights -> [B, ...]."""
    return torch.tensordot(weights_Q, values_R.unflatten(0, (len(weights_Q), -1)), dims=1)
