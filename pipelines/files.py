"""Files written whole, and tensors with words in one safetensors file, in which nothing can be executed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor


@contextmanager
def written_whole(path: Path) -> Iterator[str]:
    """The name of a file to write beside `path`, which becomes `path` when all went well and is gone otherwise."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(partial, 0o666 & ~mask)  # what a file that is simply opened gets
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a file, and make its folder. One that is there already is replaced only by a whole new one."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, Path(partial), metadata=about)
        _sort_metadata(Path(partial))


def _sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in order, in its place: the library's own order changes from run to run, and
    equal tensors should give equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def read_tensors(path: Path, advice: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU and not tied to it, and its words.

    advice: what to do about a broken one. Raises ValueError for a file that is cut short or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a whole safetensors file ({error}){advice}") from error
