"""Published models from hub-format folders: found, checked and identified before anything is computed."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors")
"""Files of a model on the hub that are fetched."""
GIB = 2**30


def find_checkpoint(source: str, field: str, *, download: bool = True) -> Path:
    """The folder of a checkpoint, fetched from the hub where it is neither a folder nor in the hub's cache.

    Args:
        source: folder, or name on the hub.
        field: of the recipe, for messages.
        download: False: only what is already here.

    Raises:
        ValueError: nothing there; names the field and the folder.
    """
    if not source:
        raise ValueError(f"{field} is empty: expected the folder of a model or its name on the hub")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _checked(folder, field)
    if not is_hub_name(source):
        raise ValueError(f"{field}: no folder {source!r}")
    try:
        found = snapshot_download(source, allow_patterns=list(PATTERNS), local_files_only=not download)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{field}: {source!r} is no folder here and not to be had from the hub: {reason}") from None
    return _checked(Path(found), field)


def is_hub_name(source: str) -> bool:
    """Whether a checkpoint that is no folder here could be a name on the hub."""
    return "://" not in source and not source.startswith((".", "/", "~")) and source.count("/") == 1


def _checked(folder: Path, field: str) -> Path:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{field}: no model in {str(folder)!r}: config.json is missing")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{field}: no weights in {str(folder)!r}: expected *.safetensors")
    return folder


def content_hash(folders: Sequence[Path]) -> str:
    """sha256 over names and contents of what makes up checkpoints, wherever they lie."""
    digest = hashlib.sha256()
    for folder in folders:
        files = sorted({p for pattern in PATTERNS for p in folder.rglob(pattern) if p.is_file()})
        for path in files:
            with path.open("rb") as file:
                digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
                digest.update(hashlib.file_digest(file, "sha256").digest())
        digest.update(b"\1")
    return digest.hexdigest()


def load_settings(folder: Path, name: str) -> PretrainedConfig:
    """Reads the settings of a checkpoint, its `config.json`.

    Args:
        folder: of `find_checkpoint`.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: the file cannot be read, or is of no known type of model.
    """
    try:
        settings: PretrainedConfig = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name}: config.json cannot be read: {first_line(error)}") from None
    return settings


def load_model(kinds: dict[str, type[PreTrainedModel]], folder: Path, field: str, **options: Any) -> PreTrainedModel:
    """A model of one of several types, in float32 on the CPU.

    Args:
        kinds: `model_type` of the config -> class.
        folder: of `find_checkpoint`.
        field: of the recipe, for messages.

    Raises:
        ValueError: another type, weights missing or of another shape, or more than the memory holds.
    """
    settings = load_settings(folder, f"{field}: {str(folder)!r}")
    if settings.model_type not in kinds:
        raise ValueError(
            f"{field}: {str(folder)!r} holds a model of type {settings.model_type!r}: expected {' or '.join(kinds)}"
        )
    kind = kinds[settings.model_type]
    check_memory(folder, field)
    options = {"config": settings, **options} if kind.config_class is type(settings) else options
    try:
        with quiet_transformers():
            # Float32 whatever the file has: half-precision weights cannot be fine-tuned, autocast does the rest.
            model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{field}: {str(folder)!r}: the weights cannot be loaded: {first_line(error)}") from None
    # transformers' own loss, which nothing here computes, keeps a buffer that some published files lack.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("criterion."))
    wrong = missing + sorted(str(key) for key in report["mismatched_keys"])
    if wrong:  # transformers would continue with random values and a warning
        raise ValueError(f"{field}: {str(folder)!r} lacks {len(wrong)} weights of its model: {', '.join(wrong[:3])}")
    return model.eval()


def load_processor(folder: Path, field: str) -> Any:
    """The image processor of a checkpoint. Raises ValueError when it has none."""
    try:
        return AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{field}: {str(folder)!r}: no image processor: {first_line(error)}") from None


def processed_hw(processor: Any, height: int, width: int) -> tuple[float, float]:
    """Height and width that an image processor resizes an image of this size to, pixels, not yet rounded.

    The processors of Mask2Former and MaskFormer stretch images to multiples of their `size_divisor` where others pad.
    """
    size = processor.size
    if not size.get("shortest_edge"):
        return size["height"], size["width"]
    longest = size.get("longest_edge") or float("inf")
    scale = min(size["shortest_edge"] / min(height, width), longest / max(height, width))
    divisor = getattr(processor, "size_divisor", None)
    if not divisor:
        return height * scale, width * scale
    return math.ceil(round(height * scale) / divisor) * divisor, math.ceil(round(width * scale) / divisor) * divisor


def load_tokenizer(folder: Path, field: str) -> Any:
    """The tokenizer of a checkpoint. Raises ValueError when it has none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{field}: {str(folder)!r}: no tokenizer: {first_line(error)}") from None


def check_memory(folder: Path, field: str) -> None:
    """Raises ValueError when a checkpoint's weights do not fit into what this machine has free."""
    needed = sum(os.path.getsize(path) for path in folder.glob("*.safetensors"))
    free = _free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"{field}: {needed / GIB:.1f} GiB of weights do not fit into the {free / GIB:.1f} GiB that are free here"
        )


def _free_memory() -> int | None:
    """Bytes of main memory that a process could still take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


class quiet_transformers:
    """Switches off transformers' progress bars and reports, which every actor would repeat."""

    def __enter__(self) -> None:
        self.bars = transformers_logging.is_progress_bar_enabled()
        self.level = transformers_logging.get_verbosity()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self.level)
        if self.bars:
            transformers_logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
