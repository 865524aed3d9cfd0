"""What masks take, for a process of its own: it imports this module, which no test can be."""

from __future__ import annotations

import torch
from torchvision.models.optical_flow import raft_large

from rewind.pipelines.evaluation.memory import held_memory, peak_memory
from rewind.pipelines.motion import Raft
from rewind.pipelines.videoshop.masks import MaskSettings, edit_mask

MASKS = {
    "a mask": {"size": (24, 3, 432, 768), "learned": False, "feather": 0},
    "a feathered mask": {"size": (24, 3, 432, 768), "learned": False, "feather": 8},
    "RAFT": {"size": (2, 3, 432, 768), "learned": True, "feather": 0},
}


def taken_by(name: str) -> float:
    """What one of MASKS, or an estimate of its motion by RAFT alone, takes after a small one of its kind, bytes."""
    torch.set_num_threads(1)
    work, raft = MASKS[name], Raft(raft_large())
    for size in ((2, 3, 128, 128), work["size"]):
        clip = torch.rand(size, generator=torch.Generator().manual_seed(0))
        before = held_memory()
        if work["learned"]:
            raft(clip[0], clip[1])
        else:
            edit_mask(clip, 1 - clip[0], MaskSettings(0.05, 4, work["feather"]))
    return (peak_memory() - before) * 2**20
