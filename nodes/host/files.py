"""What Rewind keeps on disk, each kind in a folder of the host's models that users can move by its own settings."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...demo.clip import INVERSION
from ...demo.text_to_image import EI2_WEIGHTS


class ModelFolder:
    """A folder of the host's models with one kind of safetensors file in it.

    name: of the folder, in models/ and in extra_model_paths.yaml. none: how an error about a missing file begins.
    shipped: a folder with files that come with Rewind, behind it; nothing is saved there.
    """

    def __init__(self, name: str, none: str, shipped: Path | None = None):
        self.name, self.none = name, none
        if name not in folder_paths.folder_names_and_paths:
            folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
        if shipped is not None:
            folder_paths.add_model_folder_path(name, str(shipped))

    def names(self) -> list[str]:
        """The files that can be loaded."""
        return [name for name in folder_paths.get_filename_list(self.name) if name.endswith(".safetensors")]

    def path_of(self, name: str) -> Path:
        """Where a file of `names` lies. FileNotFoundError for every other name, also one that leads elsewhere."""
        path = folder_paths.get_full_path(self.name, name) if name in self.names() else None
        if path is None:
            raise FileNotFoundError(f'{self.none} named "{name}" in models/{self.name}')
        return Path(path)

    def stamp(self, name: str) -> str:
        """Changes with the file of a name; raises as `path_of`."""
        return f"{name} {self.path_of(name).stat().st_mtime_ns}"

    def prefix_input(self, default: str) -> io.Input:
        """The input of a node that saves here, for `free_path`."""
        return io.String.Input(
            "filename_prefix",
            default=default,
            tooltip="The file's name, to which a number is added. A folder may stand before it, inside "
            f"models/{self.name}.",
        )

    def free_path(self, prefix: str) -> Path:
        """The first free number of a prefix, in a folder that is there. ValueError for one that leads out of it."""
        root = Path(os.path.abspath(folder_paths.get_folder_paths(self.name)[0]))
        if not prefix.strip() or root not in Path(os.path.abspath(root / prefix)).parents:
            raise ValueError(
                f'the filename_prefix "{prefix}" is no name inside models/{self.name}: give a name, with a folder '
                "before it or none"
            )
        root.mkdir(parents=True, exist_ok=True)
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(root))
        return Path(folder) / f"{name}_{counter:05}_.safetensors"


EI2 = ModelFolder("ei2", "there are no EI² weights", EI2_WEIGHTS.parent)
INVERSIONS = ModelFolder("inversions", "there is no inversion", INVERSION.parent)
