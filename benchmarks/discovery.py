"""Time, memory and fidelity of the path search against the procedure as published; writes a dated JSON file.

    python benchmarks/discovery.py --checkpoint deit_tiny_patch16_224.safetensors --data imagenette/train
    python benchmarks/discovery.py --model vit_base_patch16_224 --data imagenette/train --num_images 1 --repeats 1 \
        --agreement_images 0

All variants run in one process, in turns. Published (a): for every layer a clean forward pass, a forward pass on 20 x B
images with all layers so far clamped, and one backward pass per clamped layer. Ours with the same 20 left Riemann steps
(b), and by default (c). Agreement is the share of path neurons that are among those of 64 Gauss-Legendre nodes.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import date

import timm
import torch
from common import RESULTS, describe_machine, log
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import vitprune
from vitprune.discovery.discover import set_pace
from vitprune.discovery.methods import plan_search
from vitprune.models.trunk import plain_attention
from vitprune.options import DEFAULT_QUADRATURE
from vitprune.processes import peak_memory_bytes

STEPS = 20


def main(
    data: str,
    checkpoint: str | None = None,
    model: str = "deit_tiny_patch16_224",
    tokens: str = "cls",
    top_k: int = 1,
    num_images: int = 4,
    repeats: int = 3,
    agreement_images: int = 40,
    quadratures: Sequence[str] = (f"riemann:{STEPS}", DEFAULT_QUADRATURE),
    precision: str = "float32",
    device: str = "cpu",
    label: str = "",
):
    """Measure the variants.

    Args:
        data: folder of class folders.
        checkpoint: weights; None draws them at random.
        model: timm name.
        tokens: ``cls``, ``patch`` or ``all``.
        top_k: neurons per FFN.
        num_images: in each timed run; ours also runs on twice as many.
        repeats: of each timed run; medians are reported.
        agreement_images: compared with 64 nodes; 0: none.
        quadratures: of ours; the default among them.
        precision: ``tf32`` or ``bf16``: one more variant, ours by default with that.
        device: as torch names it.
        label: added to the name of the file in benchmarks/results.
    """
    network, images = _open(model, checkpoint, data, device)
    timed = _read(network, images, num_images)
    twice = _read(network, images, 2 * num_images)
    ours = {f"ours, {quadrature}": (quadrature, "float32") for quadrature in quadratures}
    default = f"ours, {DEFAULT_QUADRATURE}"
    if precision != "float32":
        ours[f"{default}, {precision}"] = (DEFAULT_QUADRATURE, precision)

    def search(batch: tuple[Tensor, Tensor], quadrature: str, precision: str = "float32") -> vitprune.Discovery:
        asked = {"quadrature": quadrature, "precision": precision}
        return vitprune.discover(network, [batch], tokens=tokens, top_k=top_k, **asked)

    programs: dict[str, Callable[[tuple[Tensor, Tensor]], Tensor]] = {
        "published": lambda batch: search_as_published(network, *batch, tokens=tokens, top_k=top_k).cpu()
    }
    for name, asked in ours.items():
        programs[name] = lambda batch, asked=asked: search(batch, *asked).neurons
    seconds: dict[str, list[float]] = {name: [] for name in (*programs, f"{default}, twice the images")}
    paths: dict[str, Tensor] = {}
    rates = []
    for repeat in range(repeats):
        rates.append(measure_matmul_rate(device))
        for name, program in programs.items():
            paths[name] = _time(seconds[name], lambda program=program: program(timed))
            log(f"repeat {repeat + 1}: {name} {seconds[name][-1]:.2f} s")
        _time(seconds[f"{default}, twice the images"], lambda: programs[default](twice))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rate = statistics.median(rates)
    rows = {}
    request = plan_search(network, tokens=tokens, top_k=top_k)
    once = count_flops(network, lambda: set_pace(network, request, timed[0]))
    for name, program in programs.items():
        if name == "published":
            one = _read(network, images, 1)
            flops = count_flops(network, lambda one=one: programs["published"](one), on_shapes=True)
        else:  # without what a search does once, whatever the number of images
            flops = (count_flops(network, lambda program=program: program(timed)) - once) / num_images
        per_image = medians[name] / num_images
        rows[name] = {
            "seconds_per_image": per_image,
            "speedup": medians["published"] / medians[name],
            "flops_per_image": flops,
            "matmul_rate_share": flops / per_image / rate,
            "same_paths_as_published": bool(torch.equal(paths[name], paths["published"])),
        }
    twofold = medians[f"{default}, twice the images"] / medians[default]
    for name, fidelity in _measure_fidelity(network, images, ours, search, agreement_images).items():
        rows[name] |= fidelity
    for name, asked in {"published": None, **ours}.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows[name]["peak_gib"] = pool.apply(
                _measure_peak, (model, checkpoint, data, device, num_images, asked, tokens, top_k)
            )
    result = {
        **describe_machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "tokens": tokens,
        "top_k": top_k,
        "num_images": num_images,
        "matmul_gflops_per_second": rate / 1e9,
        "seconds": seconds,
        "twice_the_images": twofold,
        "agreement_images": agreement_images,
        "variants": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    name = "-".join(filter(None, (str(date.today()), "discovery", model, label)))
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{model}, {tokens}, K = {top_k}: matrix products at {rate / 1e9:.0f} GFLOP/s")
    print(f"twice the images take {twofold:.2f} x the time")
    for name, row in rows.items():
        agreement = row.get("agreement_with_64_nodes")
        print(
            f"{name:22}{row['seconds_per_image']:9.3f} s/image{row['speedup']:7.1f} x"
            f"{row['flops_per_image'] / 1e9:9.0f} GFLOP {row['matmul_rate_share']:5.2f} of the rate"
            f"{row['peak_gib']:6.2f} GiB" + ("" if agreement is None else f"  agreement {agreement:.4f}")
        )


def search_as_published(
    model: nn.Module, images: Tensor, labels: Tensor, *, tokens: str, top_k: int, first_layer: int = 0
) -> Tensor:
    """Return paths [B, L, K] by clean passes, full passes on 20 x B images and one backward pass per clamped layer.

    ``first_layer`` leaves out those before it, as if their first neurons had won; the last two take the most memory.

    Source:
        arXiv:2503.09046. All K neurons of every earlier layer enter the sums.
    """
    ffns = vitprune.find_feed_forwards(model)
    scope = {"cls": slice(0, 1), "patch": slice(model.num_prefix_tokens, None), "all": slice(None)}[tokens]
    alphas_Q111 = torch.arange(STEPS, dtype=images.dtype, device=images.device).div(STEPS).view(-1, 1, 1, 1)
    rows = torch.arange(STEPS * len(images))
    neurons = [torch.arange(top_k, device=images.device).expand(len(images), -1)] * first_layer
    for layer in range(first_layer, len(ffns)):
        clean = _record(model, ffns, images, scope)
        clamped = []
        for position in range(layer + 1):
            factors_QBTH = images.new_ones(STEPS, *clean[position].shape)
            if position < layer:
                shape = (STEPS, *clean[position].shape[:2], top_k)
                places_QBTK = neurons[position].view(1, -1, 1, top_k).expand(shape)
                factors_QBTH.scatter_(3, places_QBTK, alphas_Q111.expand(shape))
            else:
                factors_QBTH *= alphas_Q111
            clamped.append((factors_QBTH * clean[position]).flatten(0, 1).requires_grad_())
        with _clamping(model, ffns, clamped, scope):
            logits = model(images.repeat(STEPS, 1, 1, 1))
        probability = logits.softmax(-1)[rows, labels.repeat(STEPS)].sum()
        gradients = []
        for leaf in clamped:  # one at a time, as published
            (gradient,) = torch.autograd.grad(probability, leaf, retain_graph=True)
            gradients.append(gradient.unflatten(0, (STEPS, -1)).mean(0))
        activation_BT1, gradient_BT1 = clean[0].new_zeros(1), clean[0].new_zeros(1)
        for position, chosen_BK in enumerate(neurons):
            chosen_BTK = chosen_BK.unsqueeze(1).expand(-1, clean[0].shape[1], -1)
            activation_BT1 = activation_BT1 + clean[position].gather(2, chosen_BTK).sum(2, keepdim=True)
            gradient_BT1 = gradient_BT1 + gradients[position].gather(2, chosen_BTK).sum(2, keepdim=True)
        score_BH = ((clean[layer] + activation_BT1) * (gradients[layer] + gradient_BT1)).mean(1)
        neurons.append(score_BH.sort(dim=-1, descending=True, stable=True).indices[:, :top_k])
    return torch.stack(neurons, 1)


def measure_matmul_rate(device: str) -> float:
    """Return floating-point operations per second of a large float32 product, here and now."""
    left, right = torch.randn(4096, 768, device=device), torch.randn(768, 3072, device=device)
    (left @ right)[0, 0].item()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 1:
        (left @ right)[0, 0].item()  # waits for the product
        count += 1
    return count * 2 * 4096 * 768 * 3072 / (time.perf_counter() - started)


class _FlopCounter(TorchDispatchMode):
    """Counts matrix products; torch's own counter follows modules, which ``torch.autograd.grad`` at a leaf breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def count_flops(network: nn.Module, program: Callable[[], object], *, on_shapes: bool = False) -> int:
    """Count the floating-point operations of all matrix products, attention's among them.

    ``on_shapes`` computes no numbers, for programs whose shapes do not depend on any.
    """
    shapes = FakeTensorMode(allow_non_fake_inputs=True) if on_shapes else nullcontext()
    with shapes, _FlopCounter() as counter, plain_attention(network):
        program()
    return counter.total


@torch.no_grad()
def _record(model, ffns, images: Tensor, scope: slice) -> list[Tensor]:
    hidden: list[Tensor] = []
    handles = [
        model.get_submodule(ffn.down_proj).register_forward_pre_hook(lambda _m, args: hidden.append(args[0][:, scope]))
        for ffn in ffns
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return hidden


@contextmanager
def _clamping(model, ffns, clamped: list[Tensor], scope: slice) -> Iterator[None]:
    """Write hidden vectors [rows, T, H] into the first FFNs while a model runs."""

    def hook_of(value: Tensor):
        def hook(_module, args):
            hidden = args[0].clone()
            hidden[:, scope] = value
            return (hidden,)

        return hook

    handles = [
        model.get_submodule(ffn.down_proj).register_forward_pre_hook(hook_of(value))
        for ffn, value in zip(ffns[: len(clamped)], clamped, strict=True)
    ]
    yield
    for handle in handles:
        handle.remove()


def _open(model: str, checkpoint: str | None, data: str, device: str):
    if checkpoint is None:
        torch.manual_seed(0)
        network = timm.create_model(model).eval()
    else:
        network = vitprune.load(model, checkpoint=checkpoint)
    return network.to(device), vitprune.find_images(data, network.num_classes)


def _read(network, images, count: int) -> tuple[Tensor, Tensor]:
    ((batch, labels),) = vitprune.ImageBatches(images.head(count), network, batch_size=count)
    device = next(network.parameters()).device
    return batch.to(device), labels.to(device)


def _time(seconds: list[float], program: Callable[[], Tensor]) -> Tensor:
    started = time.perf_counter()
    answer = program()
    seconds.append(time.perf_counter() - started)
    return answer


def _measure_fidelity(network, images, ours, search, count: int) -> dict[str, dict[str, float]]:
    """Compare paths and joint scores with those of 64 nodes; the published procedure's are those of riemann:20."""
    shares: dict[str, list[Tensor]] = {name: [] for name in ours}
    errors: dict[str, list[Tensor]] = {name: [] for name in ours}
    chosen = images.head(count) if count else ()
    for first in range(0, len(chosen), 4):
        some = chosen.at(list(range(first, min(first + 4, len(chosen)))))
        batch = _read(network, some, len(some))
        truth = search(batch, "gauss-legendre:64")
        for name, asked in ours.items():
            found = search(batch, *asked)
            among = (found.neurons.unsqueeze(-1) == truth.neurons.unsqueeze(-2)).any(-1)
            shares[name].append(among.double().mean((1, 2)))
            errors[name].append((found.joint_scores / truth.joint_scores - 1).abs())
        log(f"agreement: {first + len(some)} of {len(chosen)} images")
    return {
        name: {
            "agreement_with_64_nodes": torch.cat(shares[name]).mean().item(),
            "median_relative_error_of_joint_score": torch.cat(errors[name]).median().item(),
        }
        for name in ours
        if shares[name]
    }


def _measure_peak(model, checkpoint, data, device, count, asked, tokens, top_k) -> float:
    network, images = _open(model, checkpoint, data, device)
    batch = _read(network, images, count)
    if asked is None:
        search_as_published(network, *batch, tokens=tokens, top_k=top_k, first_layer=len(network.blocks) - 2)
    else:
        vitprune.discover(network, [batch], tokens=tokens, top_k=top_k, quadrature=asked[0], precision=asked[1])
    return (torch.cuda.max_memory_allocated() if device.startswith("cuda") else peak_memory_bytes()) / 2**30


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
