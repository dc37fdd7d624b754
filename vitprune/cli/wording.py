"""How the command line says what the library says: parameters in backquotes become flags."""

from __future__ import annotations

import re

# What a Python user passes and a command makes of something else.
_PHRASES = {
    "pass `batches`": "pass --data DIR",
    "pass some as `batches`": "pass some (--data DIR)",
    "pass `others`": "pass --data DIR",
    "pass `found`": "run 'vitprune discover MODEL --data DIR -o RUN' first and prune RUN",
    "export its model with `precision` int8": "'vitprune export --int8' makes an int8 file",
    "export it with `precision` int8": "vitprune export --int8",
    "pass `transform`": "tell it with --mean, --std, --crop and --interpolation",
    "export it anew": "export it with 'vitprune export'",
    "files that vitprune exports do": "'vitprune export' writes files that do",
    "use `device` cuda": "use --device cuda",
    "with `class_map`": "with --class-map FILE",
}
# Parameters whose flag has another name.
_FLAGS = {
    "compensation": "--compensate",
    "pruning_ratio": "--ratio",
    "num_workers": "--workers",
    "batches": "--data",
    "folder": "--output",
    "others": "--data",
    "ema_decay": "--model-ema-decay",
    "auto_augment": "--aa",
    "re_prob": "--reprob",
    "crop_pct": "--crop",
}


def in_flags(message: str) -> str:
    """Return a message of the library as the command line words it.

    >>> in_flags("a is a folder with its own weights; leave `checkpoint` out")
    'a is a folder with its own weights; leave --checkpoint out'
    """
    for phrase, told in _PHRASES.items():
        message = message.replace(phrase, told)
    return re.sub(r"`([a-z][a-z0-9_]*)`", lambda name: _FLAGS.get(name[1], "--" + name[1].replace("_", "-")), message)
