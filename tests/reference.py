"""Slow reference of the layer-progressive neuron-path search: one image, one full forward for every layer and alpha.

Letters: L layers, N tokens, T scoped tokens, H hidden neurons, K neurons per layer, Q quadrature nodes, C image
channels. F = answer(logits)[label], softmax unless said otherwise; w_TH is the hidden vector of a layer at the scoped
tokens: the input of `mlp.fc2` for an FFN, of `attn.proj` for attention. L counts both where ``kinds`` has both.

Arguments that keep their meaning: model is a timm Vision Transformer in eval mode and float64; image is normalised,
[1, C, height, width] float64; label is a class index; tokens comes from `token_slice`; neurons is a list over L of
neuron indices; nodes and weights, Q numbers each, approximate the integral over alpha in [0, 1]; kinds says which
layers there are, "ffn", "attention" or both.

Source: arXiv:2503.09046.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FFN = ("ffn",)


def token_slice(model: nn.Module, scope: str) -> slice:
    """Return the scoped tokens: the class token (``cls``), the patch tokens (``patch``) or ``all``."""
    return {"cls": slice(0, 1), "patch": slice(model.num_prefix_tokens, None), "all": slice(None)}[scope]


def clean_hidden(model: nn.Module, image: Tensor, tokens: slice, kinds=FFN) -> list[Tensor]:
    """Return the hidden vectors of an undisturbed forward: list over L of [T, H]."""
    return [h_1NH[0, tokens].detach() for h_1NH in _forward(model, image, {}, tokens, kinds)[1]]


def softmax(logits: Tensor) -> Tensor:
    """Turn logits [1, C] into probabilities."""
    return logits.softmax(dim=-1)


def prob_gradients(
    model: nn.Module, image: Tensor, label: int, clamps: dict[int, Tensor], tokens: slice, answer=softmax, kinds=FFN
) -> tuple[float, dict[int, Tensor]]:
    """Return F and dF/dw_l (layer -> [T, H]) with the hidden vectors of some layers held at ``clamps`` ([T, H])."""
    leaves = {layer: w_TH.detach().clone().requires_grad_() for layer, w_TH in clamps.items()}
    logits, _ = _forward(model, image, leaves, tokens, kinds)
    prob = answer(logits)[0, label]
    gradients = torch.autograd.grad(prob, list(leaves.values()))
    return prob.item(), dict(zip(leaves, gradients, strict=True))


def joint_attribution_score(model, image, label, neurons, nodes, weights, tokens, answer=softmax, kinds=FFN) -> float:
    """Return (sum_p w_p) * (integral of sum_p dF/dw_p): the product per token, then the mean over tokens."""
    clean = clean_hidden(model, image, tokens, kinds)
    gradients = _integrated_gradients(model, image, label, clean, neurons, nodes, weights, tokens, answer, kinds)
    activation_T, gradient_T = 0.0, 0.0
    for layer, p in _pairs(neurons):
        activation_T = activation_T + clean[layer][:, p]
        gradient_T = gradient_T + gradients[layer][:, p]
    return (activation_T * gradient_T).mean().item()


def complete_score(model, image, label, neurons, nodes, weights, tokens, kinds=FFN) -> float:
    """Return the sum over tokens and neurons of w_p * (integral of dF/dw_p), which tends to F(1) - F(0)."""
    clean = clean_hidden(model, image, tokens, kinds)
    gradients = _integrated_gradients(model, image, label, clean, neurons, nodes, weights, tokens, kinds=kinds)
    return sum((clean[layer][:, p] * gradients[layer][:, p]).sum().item() for layer, p in _pairs(neurons))


def completeness_gap(model, image, label, neurons, nodes, weights, tokens, kinds=FFN) -> float:
    """Return abs(complete_score - (F(1) - F(0))), in probability."""
    clean = clean_hidden(model, image, tokens, kinds)
    prob_1, _ = prob_gradients(model, image, label, _scaled(clean, neurons, 1.0), tokens, kinds=kinds)
    prob_0, _ = prob_gradients(model, image, label, _scaled(clean, neurons, 0.0), tokens, kinds=kinds)
    return abs(complete_score(model, image, label, neurons, nodes, weights, tokens, kinds) - (prob_1 - prob_0))


def search(
    model, image, label, top_k, nodes, weights, tokens, complete=False, answer=softmax, kinds=FFN
) -> tuple[list[list[int]], list[Tensor]]:
    """Select K neurons layer after layer: the earlier selections and the whole current layer are scaled by alpha.

    Returns:
        neurons: list over L of K indices, best first, ties towards the lower index.
        scores: list over L of [H]; each neuron of the layer joined with every neuron selected in earlier layers,
            as `joint_attribution_score`, or as `complete_score` where ``complete``.
    """
    clean = clean_hidden(model, image, tokens, kinds)
    neurons, scores = [], []
    for layer, w_TH in enumerate(clean):
        scaled = [*neurons, list(range(w_TH.shape[1]))]
        gradients = _integrated_gradients(model, image, label, clean, scaled, nodes, weights, tokens, answer, kinds)
        activation_T, gradient_T, product_T = (torch.zeros_like(w_TH[:, 0]) for _ in range(3))
        for earlier, p in _pairs(neurons):
            activation_T = activation_T + clean[earlier][:, p]
            gradient_T = gradient_T + gradients[earlier][:, p]
            product_T = product_T + clean[earlier][:, p] * gradients[earlier][:, p]
        if complete:
            score_H = (w_TH * gradients[layer] + product_T[:, None]).sum(dim=0)
        else:
            score_H = ((w_TH + activation_T[:, None]) * (gradients[layer] + gradient_T[:, None])).mean(dim=0)
        neurons.append(_best(score_H, top_k))
        scores.append(score_H)
    return neurons, scores


def integrated_gradients(model, image, label, nodes, weights, tokens, answer=softmax, kinds=FFN) -> list[Tensor]:
    """Return per layer the integrated gradients [H], tokens summed, while that layer alone is scaled by alpha."""
    clean = clean_hidden(model, image, tokens, kinds)
    scores = []
    for layer, w_TH in enumerate(clean):
        alone = [[] for _ in clean]
        alone[layer] = list(range(w_TH.shape[1]))
        gradients = _integrated_gradients(model, image, label, clean, alone, nodes, weights, tokens, answer, kinds)
        scores.append((w_TH * gradients[layer]).sum(dim=0))
    return scores


def influence_pattern(
    model: nn.Module, image: Tensor, label: int, top_k: int, tokens: slice, kinds=FFN
) -> list[list[int]]:
    """Return per layer the K neurons with the highest mean dF/dw over images alpha * image, alpha = 0, .05, ..., .95.

    Nothing is clamped: the gradient of a layer runs through all later layers.
    """
    totals = [torch.zeros_like(w_TH[0]) for w_TH in clean_hidden(model, image, tokens, kinds)]
    for step in range(20):
        scaled_image = (step / 20 * image).requires_grad_()
        logits, hidden = _forward(model, scaled_image, {}, tokens, kinds)
        gradients = torch.autograd.grad(logits.softmax(dim=-1)[0, label], hidden)
        totals = [total_H + g_1NH[0, tokens].mean(dim=0) / 20 for total_H, g_1NH in zip(totals, gradients, strict=True)]
    return [_best(total_H, top_k) for total_H in totals]


def _forward(model, image, clamps, tokens, kinds) -> tuple[Tensor, list[Tensor]]:
    """Run the model with ``clamps`` (layer -> [T, H]) written in; return logits and the list over L of [1, N, H]."""
    hidden = []

    def hook_of(layer):
        def overwrite(_module, inputs):
            h_1NH = inputs[0]
            if layer in clamps:
                h_1NH = h_1NH.clone()
                h_1NH[0, tokens] = clamps[layer]
            hidden.append(h_1NH)
            return (h_1NH,)

        return overwrite

    readers = [
        linear
        for block in model.blocks
        for kind, linear in (("attention", block.attn.proj), ("ffn", block.mlp.fc2))
        if kind in kinds
    ]
    handles = [linear.register_forward_pre_hook(hook_of(layer)) for layer, linear in enumerate(readers)]
    try:
        return model(image), hidden
    finally:
        for handle in handles:
            handle.remove()


def _scaled(clean, neurons, alpha) -> dict[int, Tensor]:
    """Return layer -> clean hidden vector [T, H] with ``neurons`` times alpha, for the layers that hold a neuron."""
    clamps = {layer: clean[layer].clone() for layer, indices in enumerate(neurons) if indices}
    for layer in clamps:
        clamps[layer][:, neurons[layer]] *= alpha
    return clamps


def _integrated_gradients(
    model, image, label, clean, neurons, nodes, weights, tokens, answer=softmax, kinds=FFN
) -> dict[int, Tensor]:
    """Return layer -> integral over alpha of dF/dw_l [T, H] while ``neurons`` are scaled by alpha."""
    integrals = {layer: torch.zeros_like(clean[layer]) for layer in _scaled(clean, neurons, 1.0)}
    for alpha, weight in zip(nodes, weights, strict=True):
        _, gradients = prob_gradients(model, image, label, _scaled(clean, neurons, alpha), tokens, answer, kinds)
        for layer, g_TH in gradients.items():
            integrals[layer] = integrals[layer] + weight * g_TH
    return integrals


def _pairs(neurons) -> list[tuple[int, int]]:
    """Return the (layer, neuron) pairs of a list over L of neuron indices."""
    return [(layer, p) for layer, indices in enumerate(neurons) for p in indices]


def _best(scores_H: Tensor, top_k: int) -> list[int]:
    """Return the indices of the K highest scores, best first, ties towards the lower index."""
    values = scores_H.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:top_k]
