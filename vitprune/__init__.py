"""Influential neuron paths of timm Vision Transformers, and smaller models without the neurons that no class needs.

The verbs: ``load``, ``find_images``, ``ImageBatches``, ``discover``, ``prune``, ``evaluate``, ``export_onnx``,
``bench``, ``save``. Names are imported on first use.
"""

from importlib import import_module
from importlib.metadata import version

_HOME_OF = {
    "VitpruneError": "vitprune.errors",
    "VitpruneNote": "vitprune.errors",
    "FeedForward": "vitprune.models.units",
    "Group": "vitprune.models.units",
    "find_groups": "vitprune.models.units",
    "find_feed_forwards": "vitprune.models.units",
    "split_attention": "vitprune.models.attention",
    "set_merging": "vitprune.models.merging",
    "parse_schedule": "vitprune.models.merge_schedule",
    "choose_schedule": "vitprune.models.merge_schedule",
    "set_image_size": "vitprune.models.image_size",
    "set_transform": "vitprune.models.transform",
    "load": "vitprune.models.load",
    "push": "vitprune.hub.push",
    "save": "vitprune.models.saved_folder",
    "as_open_clip": "vitprune.twins.to_open_clip",
    "as_torchvision": "vitprune.twins.to_torchvision",
    "save_transformers": "vitprune.twins.to_transformers",
    "save_elastic": "vitprune.models.elastic_file",
    "keep_classes": "vitprune.models.classifier",
    "new_classifier": "vitprune.models.classifier",
    "ImageSet": "vitprune.data",
    "ImageChoice": "vitprune.data",
    "ImageBatches": "vitprune.data",
    "find_images": "vitprune.data",
    "Discovery": "vitprune.discovery.discover",
    "discover": "vitprune.discovery.discover",
    "discover_run": "vitprune.discovery.discover_run",
    "class_paths": "vitprune.discovery.discover",
    "count_visits": "vitprune.discovery.discover",
    "count_correct": "vitprune.discovery.discover",
    "head_scores": "vitprune.discovery.heads",
    "class_heads": "vitprune.discovery.heads",
    "Run": "vitprune.discovery.run",
    "load_run": "vitprune.discovery.run",
    "save_run": "vitprune.discovery.run",
    "read_authors": "vitprune.interop.authors",
    "write_authors": "vitprune.interop.authors",
    "write_arrays": "vitprune.interop.arrays",
    "record_activations": "vitprune.interop.arrays",
    "score_neurons": "vitprune.calibration.criteria",
    "share_images": "vitprune.sharing",
    "Plan": "vitprune.pruning.plan",
    "read_plan": "vitprune.pruning.plan",
    "plan_pruning": "vitprune.pruning.prune",
    "apply_plan": "vitprune.pruning.prune",
    "prune": "vitprune.pruning.prune",
    "info": "vitprune.pruning.info",
    "ModelInfo": "vitprune.pruning.info",
    "Session": "vitprune.pruning.session",
    "make_elastic": "vitprune.pruning.elastic",
    "read_elastic_plan": "vitprune.pruning.plan",
    "masked": "vitprune.pruning.apply",
    "mask_neurons": "vitprune.pruning.apply",
    "remove_neurons": "vitprune.pruning.apply",
    "Statistics": "vitprune.calibration.statistics",
    "measure_statistics": "vitprune.calibration.statistics",
    "Target": "vitprune.pruning.target",
    "plan_paths": "vitprune.pruning.keep_paths",
    "target_neurons": "vitprune.pruning.target",
    "target_parameters": "vitprune.pruning.target",
    "target_macs": "vitprune.pruning.target",
    "target_latency": "vitprune.pruning.target",
    "compensate_sequentially": "vitprune.pruning.sequential",
    "distill": "vitprune.pruning.distill",
    "compensate": "vitprune.pruning.compensate",
    "recover": "vitprune.training.recover",
    "Recovered": "vitprune.training.recover",
    "Training": "vitprune.training.settings",
    "Augmentation": "vitprune.training.settings",
    "open_teacher": "vitprune.training.teacher",
    "save_recovery": "vitprune.training.recovery_folder",
    "log_to_tensorboard": "vitprune.training.tensorboard_log",
    "Accuracy": "vitprune.evaluation.accuracy",
    "evaluate": "vitprune.evaluation.accuracy",
    "predict": "vitprune.evaluation.predict",
    "Prediction": "vitprune.evaluation.predict",
    "compare": "vitprune.evaluation.accuracy",
    "embed": "vitprune.evaluation.embeddings",
    "compare_embeddings": "vitprune.evaluation.embeddings",
    "Fidelity": "vitprune.evaluation.embeddings",
    "NeighbourClassifier": "vitprune.evaluation.embeddings",
    "judge": "vitprune.evaluation.judge",
    "Source": "vitprune.evaluation.open_model",
    "Curve": "vitprune.evaluation.curve",
    "record_curve": "vitprune.evaluation.curve_folder",
    "Front": "vitprune.evaluation.front",
    "load_front": "vitprune.evaluation.front",
    "measure_front": "vitprune.evaluation.front",
    "analyze": "vitprune.analysis.analyze",
    "find_top_images": "vitprune.analysis.top_images",
    "make_cards": "vitprune.analysis.neuron_cards",
    "read_concepts": "vitprune.analysis.concepts",
    "measure_faithfulness": "vitprune.analysis.faithfulness",
    "measure_edges": "vitprune.analysis.edges",
    "count_macs": "vitprune.models.macs",
    "ffn_share": "vitprune.models.macs",
    "export_program": "vitprune.export.torch_program",
    "export_onnx": "vitprune.export.onnx_file",
    "prune_onnx": "vitprune.export.onnx_prune",
    "open_onnx": "vitprune.export.runtime",
    "bench": "vitprune.speed.bench",
    "Format": "vitprune.speed.fit_latency",
    "fit_latency": "vitprune.speed.fit_latency",
    "prune_within_drop": "vitprune.evaluation.prune_within_drop",
    "prune_for_speed": "vitprune.speed.prune_for_speed",
    "PrunedForSpeed": "vitprune.speed.prune_for_speed",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name == "__version__":
        return version("vitprune")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'vitprune' has no attribute '{name}'")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME_OF))
