"""What lies in a Hugging Face model's folder beside its weights: everything that a client may read, by one rule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Weights of any framework, and the indices of their shards.
WEIGHTS = tuple(
    f".{ending}"
    for ending in (
        *("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "onnx", "onnx_data", "h5", "msgpack", "ot", "npz"),
        *("tflite", "mlmodel", "pdparams", "distcp", "index.json"),
    )
)
CACHES = ("__pycache__",)


def side_files(folder: Path) -> Iterator[Path]:
    """The files of a model's folder that are neither weights nor caches, relative to it, in order.

    Hidden names are caches (`.cache`, `.git`). A subfolder that holds weights is another model and no part of this
    one; the other subfolders (`additional_chat_templates`) are.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in CACHES:
            continue
        if path.is_file() and not path.name.endswith(WEIGHTS):
            yield Path(path.name)
        elif path.is_dir() and not any(inner.name.endswith(WEIGHTS) for inner in path.rglob("*")):
            yield from (Path(path.name) / inner for inner in side_files(path))
