"""Match what the dense model computes by a few hundred steps of gradient descent, without labels.

Letters: B images, I images of the calibration set, N tokens, D embedding width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitprune.answer_loss import cosine_distance
from vitprune.answers import has_several, log_answers, run, shape_like
from vitprune.data import Batches, on_device
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.progress import Track, untracked
from vitprune.pruning.apply import remove_neurons
from vitprune.pruning.plan import Plan, fit_plan
from vitprune.sharing import refuse_sharing
from vitprune.views import block_of, has_classifier

NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 200, 32, 3e-4
# Weight of the blocks' relative squared error beside the loss of the answers; without it the few images are learned
# by heart.
STATES_WEIGHT = 10.0


@entry
def distill(
    model: nn.Module,
    compensated: nn.Module,
    plan: Plan,
    batches: Batches,
    *,
    weights: Mapping[str, Tensor] | None = None,
    num_steps: int = NUM_STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    track: Track = untracked,
) -> nn.Module:
    """Return a copy of the compensated model whose blocks and answers are more like the dense model's.

    Adam lowers KL(dense ‖ pruned), of encoders the cosine distance of their embeddings, plus ten times the mean over
    blocks of the relative squared error of their outputs, over weights and biases of the FFNs' output projections
    alone, with a cosine schedule. Every other image is mirrored. The images are kept in memory in half precision.

    Args:
        model: the dense model; stays as it is.
        compensated: of the same shapes, to start from; stays as it is.
        plan: which neurons stay.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels, which are
            not used. Read once.
        weights: FFN name -> weight of each token [N] in its block's error, as ``weigh_tokens`` gives them; None: all
            the same.
        num_steps: of 32 images each.
        learning_rate: of the first step.
        seed: of the order of images and of mirroring.
        track: wraps (steps, description), for progress.

    Returns:
        A model of the dense shapes; the columns of removed neurons are as in ``compensated``.

    Raises:
        VitpruneError: if the plan is not for this model, or ``batches`` is empty.

    Source:
        Answers as in Hinton et al., arXiv:1503.02531, at temperature 1; states of the blocks as in Romero et al.,
        arXiv:1412.6550.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 4]))]
    >>> plan = Plan({f"blocks.{block}.mlp": torch.arange(768) < 384 for block in range(2)})
    >>> result = distill(model, model, plan, batches, num_steps=1)
    >>> bool((result.blocks[1].mlp.fc2.weight != model.blocks[1].mlp.fc2.weight).any())
    True
    """
    refuse_sharing("distill", "use `compensate_sequentially`, and train what comes of it (`recover`)")
    ffns = fit_plan(model, plan)
    blocks = [block_of(group.name) for group in ffns]
    kept, several = [], False
    for images, labels in batches:
        kept.append(images.cpu().half())
        several = several or has_several(labels)
    images_I = torch.cat(kept or [torch.zeros(0)])
    if len(images_I) == 0:
        raise VitpruneError("no calibration images")
    student = remove_neurons(compensated, plan).requires_grad_(False)
    trained = [parameter for ffn in ffns for parameter in student.get_submodule(ffn.read_by).parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    num_rounds = -(-num_steps * BATCH_SIZE // len(images_I))
    order = torch.cat([torch.randperm(len(images_I), generator=generator) for _ in range(num_rounds)])
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for step in track(range(num_steps), "distill"):
        images = images_I[order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]].float()
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        ((images, _labels),) = on_device(model, [(images, torch.zeros(len(images)))])
        with torch.no_grad(), _recorded(model, blocks) as wanted:
            answers = run(model, images)
        with torch.enable_grad(), _recorded(student, blocks) as got:
            logits = student(images)
            loss = STATES_WEIGHT * _states_error(ffns, blocks, wanted, got, weights)
            if has_classifier(model):
                got_BC, wanted_BC = (log_answers(each.float(), several=several) for each in (logits, answers))
                loss = loss + nn.functional.kl_div(got_BC, wanted_BC, log_target=True, reduction="batchmean")
            else:
                embedded, wanted_too = (shape_like(model, each) for each in (logits, answers))
                loss = loss + cosine_distance(wanted_too, embedded).float().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
    result = copy.deepcopy(compensated)
    with torch.no_grad():
        for ffn in ffns:
            down, learned = result.get_submodule(ffn.read_by), student.get_submodule(ffn.read_by)
            down.weight[:, plan.kept(ffn.name).to(down.weight.device)] = learned.weight
            if learned.bias is not None:
                down.bias.copy_(learned.bias)
    return result


def _states_error(ffns, blocks: Sequence[str], wanted, got, weights: Mapping[str, Tensor] | None) -> Tensor:
    """Return the mean over blocks of the squared error of their outputs relative to these outputs' variance."""
    total = 0.0
    for ffn, block in zip(ffns, blocks, strict=True):
        wanted_BND, got_BND = (states[block].float().flatten(1, -2) for states in (wanted, got))
        weights_N1 = torch.ones(1) if weights is None else weights[ffn.name].unsqueeze(1)
        weights_N1 = weights_N1.to(wanted_BND)
        spread = (weights_N1 * (wanted_BND - wanted_BND.mean((0, 1))).square()).mean()
        total = total + (weights_N1 * (got_BND - wanted_BND).square()).mean() / spread
    return total / len(blocks)


@contextmanager
def _recorded(model: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of blocks."""
    outputs: dict[str, Tensor] = {}
    handles = []
    try:
        for name in blocks:
            hook = lambda _module, _inputs, output, name=name: outputs.update({name: output})  # noqa: E731
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
