"""EI²'s weights on disk, in a folder of the host's models that users can move by its own settings.

Behind it comes a folder of Rewind's own, whose weights come with it; nothing is saved there.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import folder_paths

from ...demo.text_to_image import EI2_WEIGHTS
from ...pipelines.ei2.weights import EI2Weights, load_weights, save_weights

FOLDER = "ei2"
if FOLDER not in folder_paths.folder_names_and_paths:
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
folder_paths.add_model_folder_path(FOLDER, str(EI2_WEIGHTS.parent))


def names() -> list[str]:
    """The files that can be loaded."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(".safetensors")]


def path_of(name: str) -> Path:
    """Where a file of `names` lies. FileNotFoundError for every other name, one that leads out of the folder too."""
    path = folder_paths.get_full_path(FOLDER, name) if name in names() else None
    if path is None:
        raise FileNotFoundError(f'there are no EI² weights named "{name}" in models/{FOLDER}')
    return Path(path)


def load(name: str) -> EI2Weights:
    """Weights by their file's name."""
    return load_weights(path_of(name))


def save(weights: EI2Weights, prefix: str, caption: str = "") -> Path:
    """Write weights under the first free number of a prefix, with a caption instead of theirs unless that is empty.

    ValueError for a prefix that leads out of the folder.
    """
    root = Path(os.path.abspath(folder_paths.get_folder_paths(FOLDER)[0]))
    if not prefix.strip() or root not in Path(os.path.abspath(root / prefix)).parents:
        raise ValueError(
            f'the filename_prefix "{prefix}" is no name inside models/{FOLDER}: give a name, with a folder before it '
            "or none"
        )
    root.mkdir(parents=True, exist_ok=True)
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(root))
    path = Path(folder) / f"{name}_{counter:05}_.safetensors"
    save_weights(path, replace(weights, caption=caption or weights.caption))
    return path
