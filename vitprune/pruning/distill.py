"""Match the dense model's answers by a few hundred steps of gradient descent, without labels.

Letters: B images, I images of the calibration set, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vitprune.data import Batches, on_device
from vitprune.errors import VitpruneError
from vitprune.pruning.apply import remove_neurons
from vitprune.pruning.plan import Plan, fit_plan

NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 300, 32, 3e-4


def distill(
    model: nn.Module,
    compensated: nn.Module,
    plan: Plan,
    batches: Batches,
    *,
    num_steps: int = NUM_STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    track: Callable[[range], Any] = iter,
) -> nn.Module:
    """Return a copy of the compensated model whose output projections answer more like the dense model.

    Adam lowers KL(dense ‖ pruned) over the output projections' weights and biases alone, with a cosine schedule. Every
    other image is mirrored; the dense model answers the mirrored image too. The images are kept in memory in half
    precision.

    Args:
        model: the dense model; stays as it is.
        compensated: of the same shapes, to start from; stays as it is.
        plan: which neurons stay.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels, which are
            not used. Read once.
        num_steps: of 32 images each.
        learning_rate: of the first step.
        seed: of the order of images and of mirroring.
        track: wraps the steps, for progress.

    Returns:
        A model of the dense shapes; the columns of removed neurons are as in ``compensated``.

    Raises:
        VitpruneError: if the plan is not for this model, the model has no classifier, or ``batches`` is empty.

    Source:
        Hinton et al., arXiv:1503.02531, at temperature 1.
    """
    ffns = fit_plan(model, plan)
    if getattr(model, "num_classes", 1) < 1:
        raise VitpruneError("distill needs a classifier, but the model has none (num_classes=0)")
    student = remove_neurons(compensated, plan).requires_grad_(False)
    trained = [parameter for ffn in ffns for parameter in student.get_submodule(ffn.down_proj).parameters()]
    images_I, answers_I2C = [], []
    with torch.no_grad():
        for images, _labels in on_device(model, batches):
            images_I.append(images.cpu().half())
            both = [model(view).float().log_softmax(-1).cpu() for view in (images, images.flip(-1))]
            answers_I2C.append(torch.stack(both, 1))
    if not images_I:
        raise VitpruneError("no calibration images")
    images_I, answers_I2C = torch.cat(images_I), torch.cat(answers_I2C)
    device, dtype = trained[0].device, trained[0].dtype
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(images_I), generator=generator) for _ in range(_epochs(num_steps, images_I))])
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    with torch.enable_grad():
        for step in track(range(num_steps)):
            picked = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            mirrored = torch.rand(len(picked), generator=generator) < 0.5
            images = images_I[picked].to(dtype)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
            answers = answers_I2C[picked, mirrored.long()]
            logits = student(images.to(device)).float()
            loss = nn.functional.kl_div(
                logits.log_softmax(-1), answers.to(device), reduction="batchmean", log_target=True
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    result = copy.deepcopy(compensated)
    with torch.no_grad():
        for ffn in ffns:
            down, learned = result.get_submodule(ffn.down_proj), student.get_submodule(ffn.down_proj)
            down.weight[:, plan.kept(ffn.name).to(device)] = learned.weight
            if learned.bias is not None:
                down.bias.copy_(learned.bias)
    return result


def _epochs(num_steps: int, images_I) -> int:
    return -(-num_steps * BATCH_SIZE // len(images_I))
