"""The baselines against captum, which computes the same by hooks and graphs of its own."""

from __future__ import annotations

import pytest
import torch
from captum.attr import IntegratedGradients, InternalInfluence, LayerActivation
from conftest import make_vit

from vitprune.discovery.baselines import (
    INFLUENCE_STEPS,
    activation_paths,
    influence_pattern_paths,
    knowledge_neuron_paths,
)
from vitprune.discovery.quadrature import parse_quadrature
from vitprune.discovery.search import Search
from vitprune.models.path_layers import find_path_layers

LABELS = torch.tensor([0, 3, 1])
NODES = 6
BOTH = ("ffn", "attention")
# captum holds its nodes in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-8}


def search_of(model, method, tokens):
    layers = tuple(find_path_layers(model, BOTH))
    return Search(layers, method, 1, tokens, parse_quadrature(f"gauss-legendre:{NODES}"))


def probabilities_of(model):
    return lambda images: model(images).softmax(-1)


@pytest.fixture(params=["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def model(request):
    return make_vit(request.param)


def test_knowledge_neurons_are_integrated_gradients_of_the_hidden_vector(model, tiny_images):
    """From no activation; captum's own ``LayerIntegratedGradients`` starts at what a black image gives."""
    search = search_of(model, "knowledge-neurons", "all")
    got = knowledge_neuron_paths(model, search, tiny_images, LABELS)
    for layer, score_BH in zip(search.layers, got.scores, strict=True):
        reader = model.get_submodule(layer.read_by)
        hidden = []
        handle = reader.register_forward_pre_hook(lambda _module, inputs, hidden=hidden: hidden.append(inputs[0]))
        model(tiny_images)
        handle.remove()

        def answer(h_RNH, images_RCHW, reader=reader):
            handle = reader.register_forward_pre_hook(lambda _module, _inputs: (h_RNH,))
            try:
                return model(images_RCHW).softmax(-1)
            finally:
                handle.remove()

        attributed_BNH = IntegratedGradients(answer).attribute(
            hidden[0].detach(),
            target=LABELS,
            additional_forward_args=(tiny_images,),
            n_steps=NODES,
            method="gausslegendre",
        )
        torch.testing.assert_close(score_BH, attributed_BNH.sum(1), **CLOSE)


@pytest.mark.parametrize(("tokens", "places"), [("cls", slice(0, 1)), ("all", slice(None))])
def test_influence_patterns_are_internal_influence(model, tokens, places, tiny_images):
    search = search_of(model, "influence-pattern", tokens)
    got = influence_pattern_paths(model, search, tiny_images, LABELS)
    for layer, score_BH in zip(search.layers, got.scores, strict=True):
        influence_BNH = InternalInfluence(probabilities_of(model), model.get_submodule(layer.read_by)).attribute(
            tiny_images, target=LABELS, n_steps=INFLUENCE_STEPS, method="riemann_left", attribute_to_layer_input=True
        )
        influence_BNH = influence_BNH[0] if isinstance(influence_BNH, tuple) else influence_BNH
        torch.testing.assert_close(score_BH, influence_BNH[:, places].mean(1), **CLOSE)


def test_activations_are_layer_activations(model, tiny_images):
    search = search_of(model, "activation", "cls")
    got = activation_paths(model, search, tiny_images, LABELS)
    for layer, score_BH in zip(search.layers, got.scores, strict=True):
        active_BNH = LayerActivation(model, model.get_submodule(layer.read_by)).attribute(
            tiny_images, attribute_to_layer_input=True
        )
        active_BNH = active_BNH[0] if isinstance(active_BNH, tuple) else active_BNH
        torch.testing.assert_close(score_BH, active_BNH[:, 0])
