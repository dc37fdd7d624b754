"""What a user can choose, with one line of help each; plain data, so that help for it needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from vitprune.errors import VitpruneError

METHODS: Mapping[str, str] = {
    "jas": "joint attribution score, layer by layer (the paper)",
    "jas-complete": "the same with the variant that obeys completeness",
    "activation": "highest activation in each layer",
    "influence-pattern": "highest gradient along the scaled image",
    "knowledge-neurons": "integrated gradients of each FFN by itself",
    "random": "random neurons, the baseline",
}

# Methods that the program of the paper's authors has, and where its result files hold their paths.
AUTHORS_METHODS: Mapping[str, str] = {
    "jas": "'ja' in their records",
    "activation": "'base'",
    "influence-pattern": "'path'",
}

TOKENS: Mapping[str, str] = {
    "cls": "class token",
    "patch": "patch tokens",
    "all": "every token",
}

NODES: Mapping[str, str] = {
    "ffn": "neurons of the FFNs (the paper)",
    "attention": "dimensions of what the heads hand to their output projection",
}

TARGET_CLASSES: Mapping[str, str] = {
    "label": "the image's own class (the paper)",
    "predicted": "the class that the model answers",
}

QUANTITIES: Mapping[str, str] = {
    "probability": "softmax (the paper)",
    "logit": "before the softmax",
    "cosine": "similarity of the embedding to the mean of the class, for models without classes",
}

PRECISIONS: Mapping[str, str] = {
    "float32": "as the weights are",
    "tf32": "TensorFloat-32 on a GPU that has it",
    "bf16": "bfloat16",
}

PRECISIONS_TORCH: Mapping[str, str] = {**PRECISIONS, "fp16": "float16"}

PARTS: Mapping[str, str] = {
    "ffn": "neurons of FFNs",
    "qk": "dimensions of queries and keys",
    "vo": "dimensions of values",
    "heads": "heads of attention",
    "layers": "whole attentions and FFNs",
    "tokens": "patches that are alike become one token",
    "pixels": "images are smaller, and have fewer patches",
}

CRITERIA: Mapping[str, str] = {
    "random": "random scores, the baseline",
    "magnitude": "norm of all weights of a neuron",
    "activation": "mean absolute activation",
    "variance": "variance that a neuron brings into the FFN's output (CORP)",
    "wanda": "size of the activation times size of its weights",
    "taylor": "first-order change of the loss (needs labels)",
    "fisher": "second-order change of the loss, diagonal",
    "integrated-gradients": "change of the loss along the way from a silent FFN (needs labels; slow)",
    "jas": "mean score of the path search over classes (needs a run)",
    "obs": "loss that removal costs after compensation, neurons eliminated one by one",
}

ALLOCATIONS: Mapping[str, str] = {
    "uniform": "the same ratio in every FFN",
    "global": "one ranking over all FFNs, with a floor per FFN",
}

COMPENSATIONS: Mapping[str, str] = {
    "none": "leave the kept weights as they are",
    "bias": "add the removed neurons' mean output to the bias",
    "ridge": "least-squares reconstruction from the kept neurons",
    "sequential-ffn": "the same block by block, on the states of the already pruned blocks",
    "sequential": "the same, and FFNs and attention steer the residual stream back to the dense model's",
    "distill": "sequential, then gradient descent towards the dense model's blocks and answers (no labels; minutes)",
}

LOSSES: Mapping[str, str] = {
    "answers": "KL divergence from the teacher's answers, at a temperature (no labels)",
    "features": "relative squared error of what the classifier reads (no labels)",
    "blocks": "the same of every block's output (no labels)",
    "labels": "cross-entropy with the labels",
}

TARGETS: Mapping[str, str] = {
    "neurons": "FFN neurons",
    "parameters": "parameters",
    "macs": "multiply-accumulates",
    "latency": "ms",
}

EXPERIMENTS: Mapping[str, str] = {
    "scores": "joint attribution score of each method's paths",
    "manipulation": "remove and double the neurons of each image's own path",
    "halves": "the same with class paths found on the other half of each class's images, and with another class's",
    "heads": "remove and double whole heads, those that bring most to the class and those that bring least",
    "similarity": "how alike the paths of images and classes are, and how many neurons ever lie on one",
    "stability": "which neurons of the class paths are sure, by drawing the images of each class anew",
    "top-images": "images of the run that excite the neurons at the end of the class paths most",
    "edges": "which neurons of a class path feed which, and how far estimates agree with cutting them",
    "cards": "what single neurons of the class paths respond to, where they point and what scaling them changes",
    "transfer": "as manipulation, with the class paths of the run on other images",
    "faithfulness": "keep only the best neurons, or all others, from one to all of them, on other images",
    "topk-mask": "mask all but the top neurons of each class, on other images (slow)",
}

ABLATIONS: Mapping[str, str] = {
    "zero": "nothing, as pruning does (the paper)",
    "mean": "their mean over the images of the run",
    "class-mean": "their mean over the images of the class in the run",
    "resample": "what they are on another image of the run, drawn by the seed",
    "double": "twice what they are",
}

DEFAULT_ABLATIONS = ("zero", "mean")

# Ways to be faster, as a front of accuracy against speed shows them.
LEVERS: Mapping[str, str] = {
    "dense": "nothing removed",
    "budget": "as fast as asked for, by all parts",
    "pixels": "smaller images",
    "merging": "tokens merged in equal steps",
    "neurons": "FFN neurons alone",
    "variance": "query/key dimensions and FFN neurons by variance, with ridge regression",
}

MODES: Mapping[str, str] = {
    "remove": "smaller linear layers: a smaller, faster model",
    "mask": "same shapes, removed neurons have no effect",
}

PRECISIONS_ONNX: Mapping[str, str] = {
    "float32": "as the weights are",
    "float16": "weights and all that is computed in half the bits, for GPUs and other accelerators",
    "int8": "8-bit products with weights, activations quantised as they come",
    "int8-static": "the same for other runtimes, activations quantised by what they are on calibration images",
}

# What a model may be run in, beside float32, to be as fast as asked for.
ALLOWED_PRECISIONS: Mapping[str, str] = {
    "int8": "8-bit products with weights; on openvino those of attention as well, by calibration images",
    "float16": "half the bits, for GPUs",
}

FORMATS: Mapping[str, str] = {
    "onnx": "for ONNX Runtime and others",
    "openvino": "OpenVINO's own",
    "torch": "a program of torch.export, which runs with torch alone",
    "transformers": "a folder of that library, for a model that came from it",
}

OPERATORS: Mapping[str, str] = {
    "onnxruntime": "attention as one operator of ONNX Runtime's own, the fastest there",
    "standard": "ONNX alone, for other runtimes",
}

BACKENDS: Mapping[str, str] = {
    "torch-eager": "torch as it is",
    "torch-compile": "torch.compile",
    "onnxruntime-cpu": "ONNX Runtime, CPU provider",
    "onnxruntime-cuda": "its CUDA provider",
    "onnxruntime-tensorrt": "its TensorRT provider",
    "onnxruntime-openvino": "its OpenVINO provider",
    "openvino": "OpenVINO's own runtime, CPU",
}

# What rows of a curve, of a front and of top-K masking are of.
DENSE, BUDGET = "dense", "budget"
ORACLE, ONE_PLAN, CLEAN = "oracle class", "one plan for all", "clean"

DEFAULT_QUADRATURE, DEFAULT_FIXED_QUADRATURE = "adaptive", "gauss-legendre:8"
DEFAULT_RATIO = 0.5
DEFAULT_CRITERION = "obs"
DEFAULT_ALLOCATION = "global"
DEFAULT_COMPENSATION = "sequential"
DEFAULT_FLOOR = 0.02
DEFAULT_RIDGE = 1e-3
DEFAULT_STEP = 0.1


def check_choice(what: str, value: str, choices: Mapping[str, str]) -> None:
    """Refuse a value that is not on the list.

    Raises:
        VitpruneError: naming what would be right.
    """
    if value not in choices:
        raise VitpruneError(f"{what} must be one of {', '.join(choices)}, got '{value}'")
