"""What a path through attention as well as FFNs carries, and what it costs to find; a dated JSON file.

    python benchmarks/path_kinds.py --checkpoint deit_tiny_patch16_224.safetensors --data imagenette/val

Paths are removed from the images that they were found on, at the scoped tokens, and the change of the true class's
probability is compared class by class. Times are of one run, the kinds in turns.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import date

import torch
from common import RESULTS, describe_machine, log
from jsonargparse import auto_cli

import vitprune
from vitprune.analysis.interventions import deviate, deviations_by_class, measure_interventions, measure_reactions
from vitprune.discovery.discover import Discovery
from vitprune.discovery.heads import class_heads
from vitprune.intervals import mean_interval
from vitprune.models.path_layers import kind_of_layer

BOTH = ("ffn", "attention")
# name -> how its paths are found.
SEARCHES = {
    "ffn": {"nodes": ("ffn",)},
    "ffn, two per layer": {"nodes": ("ffn",), "top_k": 2},
    "both": {"nodes": BOTH},
    "random, both": {"nodes": BOTH, "method": "random"},
}


def main(
    checkpoint: str,
    data: str,
    model: str = "deit_tiny_patch16_224",
    images_per_class: int = 10,
    batch_size: int = 10,
):
    """Measure one model.

    Args:
        checkpoint: weights.
        data: folder of images, one folder for each class.
        model: timm name.
        images_per_class: spread evenly over the folder.
        batch_size: images searched together, the kinds in turns.
    """
    network = vitprune.load(model, checkpoint=checkpoint).float()
    images = vitprune.find_images(data, network.num_classes, images_per_class=images_per_class)
    batches = list(vitprune.ImageBatches(images, network, batch_size=batch_size))
    parts: dict[str, list[Discovery]] = {name: [] for name in SEARCHES}
    seconds = dict.fromkeys(SEARCHES, 0.0)
    for number, batch in enumerate(batches, 1):
        for name, asked in SEARCHES.items():
            started = time.perf_counter()
            parts[name].append(vitprune.discover(network, [batch], **asked))
            seconds[name] += time.perf_counter() - started
        log(
            f"{number} of {len(batches)} batches; both cost {seconds['both'] / seconds['ffn']:.2f} times as much as ffn"
        )
    neurons = {name: torch.cat([part.neurons for part in found]) for name, found in parts.items()}
    kinds = {name: [kind_of_layer(layer) for layer in found[0].layers] for name, found in parts.items()}
    paths = {name: (neurons[name], SEARCHES[name]["nodes"]) for name in SEARCHES}
    for kind in BOTH:
        places = [place for place, each in enumerate(kinds["both"]) if each == kind]
        paths[f"both: its part of {kind}"] = (neurons["both"][:, places], (kind,))
    whole = vitprune.discover(network, batches, method="jas", nodes=BOTH)
    for name, highest in (("best heads", True), ("least heads", False)):
        of_class = class_heads(whole, highest=highest)
        paths[name] = (torch.stack([of_class[int(label)] for label in whole.labels]), ("attention",))
    clean = measure_reactions(network, batches)
    scope = parts["both"][0].tokens
    rows, by_class = [], {}
    for name, (chosen, nodes) in paths.items():
        for factor in (0.0, 2.0):
            changed = measure_interventions(network, batches, chosen, [(factor, scope)], nodes=nodes)[factor, scope]
            found = deviate(clean, changed)
            by_class[name, factor] = deviations_by_class(clean, changed)
            rows.append(
                {
                    "paths": name,
                    "factor": factor,
                    "num_nodes": chosen.shape[1] * chosen.shape[2],
                    "probability_deviation": asdict(found.probability_deviation),
                    "top1": found.top1,
                    "joint_score": None
                    if name not in parts
                    else torch.cat([part.joint_scores for part in parts[name]]).mean().item(),
                }
            )
            log(f"{name} x {factor:g}: {found.probability_deviation.mean:+.3f} (top-1 {found.top1:.3f})")
    more = {
        f"both minus {other}": asdict(
            mean_interval([by_class["both", 0.0][index] - value for index, value in by_class[other, 0.0].items()])
        )
        for other in ("ffn", "ffn, two per layer", "random, both")
    }
    result = {
        **describe_machine(),
        "model": model,
        "num_images": len(images),
        "tokens": scope,
        "top1": (clean.prediction == clean.label).double().mean().item(),
        "seconds_per_image": {name: total / len(images) for name, total in seconds.items()},
        "cost_of_both": seconds["both"] / seconds["ffn"],
        "rows": rows,
        "removed_more": more,
    }
    path = RESULTS / f"{date.today()}-path-kinds-{model}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    for name, value in more.items():
        log(f"{name}: {value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]")
    log(f"both cost {result['cost_of_both']:.2f} times as much as ffn; wrote {path.name}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
