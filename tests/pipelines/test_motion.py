"""Optical flow against known motion, and masks carried along the synthetic world's clips against the true ones."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import interpolate

from rewind.demo.clip import SEEDS, example
from rewind.demo.world import World
from rewind.pipelines.motion import Raft, load_raft, lucas_kanade, propagate


def texture(height, width, seed=0):
    """A smooth random picture, [3, height, width] in 0..1."""
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    return interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0].clamp(0, 1)


def overlap(mask, truth):
    """Intersection over union of two masks, frame by frame."""
    mask, truth = mask > 0.5, truth > 0.5
    return ((mask & truth).sum((1, 2)) / (mask | truth).sum((1, 2))).tolist()


# --- the flow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "dx", "dy"), [(96, 96, 5, -3), (75, 131, -9, 6), (40, 24, 2, 1), (330, 400, 14, -11)]
)
def test_a_known_shift_is_found(height, width, dx, dy):
    large = texture(height + 32, width + 32)
    frame = large[:, 16 : 16 + height, 16 : 16 + width]
    other = large[:, 16 - dy : 16 - dy + height, 16 - dx : 16 - dx + width]  # what is at p there is at p + d here
    error = (lucas_kanade(frame, other) - torch.tensor([dx, dy])[:, None, None]).norm(dim=0)
    inside = error[16:-16, 16:-16] if height > 60 else error[8:-8, 8:-8]
    assert float(inside.median()) < 0.1 and float((inside < 1).float().mean()) > 0.99


def test_nothing_moves_where_nothing_is_seen():
    frame = texture(48, 64)
    assert float(lucas_kanade(frame, frame).abs().max()) < 1e-4
    grey = torch.full((3, 48, 64), 0.5)
    assert not lucas_kanade(grey, grey).any()
    assert float(lucas_kanade(grey, frame).abs().max()) == 0, "without a gradient there is no telling"


def test_frames_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 48, 64\) and \(3, 48, 60\)"):
        lucas_kanade(texture(48, 64), texture(48, 60))
    with pytest.raises(ValueError, match="must be one"):
        lucas_kanade(texture(48, 64)[:1], texture(48, 64)[:1])


# --- masks ------------------------------------------------------------------------------------------------------------


def test_a_mask_goes_where_its_pixels_go():
    """A flow that is known exactly: 2 pixels to the right and 1 down from each frame to the next."""
    mask, told = torch.zeros(20, 30), []
    mask[4:9, 5:12] = 1

    def back(frame, other):
        return torch.tensor([-2.0, -1.0])[:, None, None].expand(2, 20, 30)

    moved = propagate(mask, torch.zeros(4, 3, 20, 30), back, told.append)
    assert torch.equal(moved, torch.stack([mask.roll((i, 2 * i), (0, 1)) for i in range(4)]))
    assert told == [1, 2, 3]


def test_a_mask_of_a_still_stays():
    mask = (texture(48, 64)[0] > 0.5).float()
    assert torch.equal(propagate(mask, texture(48, 64).expand(3, -1, -1, -1)), mask.expand(3, -1, -1))


@pytest.mark.parametrize("world", [World(), World(noise_floor=0.05)], ids=["plain", "textured"])
def test_the_masks_of_moving_objects_are_the_true_ones(world):
    """The gate: on every one of these clips each frame's mask is the object's, within what the edge's pixels are."""
    found = []
    for seed in range(SEEDS["validation"], SEEDS["validation"] + 4):
        chosen = example(seed, world=world)
        found.append(overlap(propagate(chosen.source_mask[0], chosen.source), chosen.source_mask))
        still = overlap(chosen.source_mask[:1].expand_as(chosen.source_mask), chosen.source_mask)
        assert still[-1] < 0.5, "the object hardly moves: the clip says nothing"
    found = torch.tensor(found)
    assert float(found[:, 0].min()) == 1
    assert float(found.min()) > 0.94 and float(found[:, -1].mean()) > 0.975, found


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"mask of shape \(20, 20\) for a clip of shape \(2, 3, 20, 30\)"):
        propagate(torch.ones(20, 20), torch.zeros(2, 3, 20, 30))


# --- learned flow -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    return raft_small(weights=None).eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_weights_of_a_file_are_used(network, tmp_path, suffix):
    file = tmp_path / f"raft{suffix}"
    weights = network.state_dict()
    torch.save(weights, file) if suffix == ".pth" else save_file(weights, file)
    frame, other = texture(128, 136, 1), texture(128, 136, 2)
    wanted = network(2 * frame[None] - 1, 2 * other[None] - 1)[-1][0]
    torch.testing.assert_close(load_raft(file)(frame, other), wanted)


def test_raft_takes_frames_of_any_size(network):
    """A network that finds 8 pixels to the right in what it is shown, which is larger than the frame."""

    class Right(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, now, then):
            self.shown = now
            return [torch.tensor([8.0, 0.0])[None, :, None, None].expand(1, 2, *now.shape[2:])]

    right = Right()
    flow = Raft(right)(texture(50, 70), texture(50, 70))
    height, width = right.shown.shape[2:]
    assert height % 8 == 0 and width % 8 == 0 and min(height, width) >= 128
    assert -1 <= float(right.shown.min()) < 0 < float(right.shown.max()) <= 1
    torch.testing.assert_close(flow, torch.tensor([8 * 70 / width, 0])[:, None, None].expand(2, 50, 70))


def test_other_files_are_refused(network, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_raft(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("x")
    with pytest.raises(ValueError, match="does not open as a file of weights"):
        load_raft(tmp_path / "text.pth")
    wrong = {"other.pth": {"a": torch.zeros(1)}, "list.pth": [1, 2]}
    wrong["narrow.pth"] = {name: tensor[:1] if tensor.ndim else tensor for name, tensor in network.state_dict().items()}
    for name, content in wrong.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match="does not hold the weights"):
            load_raft(tmp_path / name)
