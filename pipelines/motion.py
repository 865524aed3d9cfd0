"""How a clip moves: optical flow from one frame to another, and a mask of the first frame carried along it.

No flow without weights comes with torch, torchvision or kornia, and OpenCV is no requirement (a host may have another
build of it), so the textbook's is put together here from kornia's filters. A learned one (RAFT) takes its place where
a user has its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

Flow = Callable[[Tensor, Tensor], Tensor]  # (frame, other), [3, H, W] in 0..1, to [2, H, W] as `lucas_kanade` gives it

COARSEST, FINEST = 12, 288  # pixels of the shorter side: where the pyramid ends, and the largest size worked at
WINDOW = 7  # pixels to each side of the Gaussian window in which one motion is assumed
REPEATS = 6  # of the solution on each level of the pyramid
STIFFNESS = 3e-4  # of the solution, in squared gradients of pixels in 0..1: where nothing is seen, the coarser stands
RAFT_MULTIPLE, RAFT_LEAST = 8, 128  # pixels that RAFT's sides must be multiples of, and at least


def _grid(height: int, width: int, like: Tensor) -> Tensor:
    """The centre (x, y) of every pixel, [2, H, W]."""
    y, x = (torch.arange(side, device=like.device, dtype=torch.float32) + 0.5 for side in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))


def _look_up(image: Tensor, where: Tensor) -> Tensor:
    """An image [C, H, W] at points (x, y) [2, H, W]; outside it its border goes on."""
    size = torch.tensor([image.shape[2], image.shape[1]], device=where.device)[:, None, None]
    points = (2 * where / size - 1).permute(1, 2, 0)[None]
    return grid_sample(image[None], points, align_corners=False, padding_mode="border")[0]


def _enlarge(flow: Tensor, height: int, width: int) -> Tensor:
    """A flow [1, 2, h, w] at another size, in pixels of that size."""
    if flow.shape[2:] == (height, width):
        return flow
    scale = flow.new_tensor([width / flow.shape[3], height / flow.shape[2]])[:, None, None]
    return scale * interpolate(flow, (height, width), mode="bilinear", align_corners=False)


def lucas_kanade(frame: Tensor, other: Tensor) -> Tensor:
    """Where each pixel of a frame is found in another one: the way there (dx, dy) in pixels, [2, H, W].

    frame, other: [3, H, W] in 0..1. Lucas and Kanade (1981), dense, on a Gaussian pyramid (Bouguet, 2000), repeated on
    each level with the other frame warped by what is known. A level solves, in a Gaussian window around each pixel,
        [sum gx gx + e, sum gx gy; sum gx gy, sum gy gy + e] d = sum (gx, gy) (frame - other(p + flow))
    for the step d, over all three colours. Ours are e (STIFFNESS), that no step is longer than a pixel, and that what
    has left the frame does not count. Frames with a shorter side above FINEST are looked at smaller: a mask needs no
    finer motion. Raises ValueError for other shapes.
    """
    from kornia.filters import gaussian_blur2d, spatial_gradient
    from kornia.geometry.transform import build_pyramid

    _check_frames(frame, other)
    height, width = frame.shape[1:]
    pair = torch.stack([frame, other]).float()
    if min(height, width) > FINEST:
        size = tuple(round(side * FINEST / min(height, width)) for side in (height, width))
        pair = interpolate(pair, size, mode="bilinear", align_corners=False, antialias=True)
    levels = max(1, 1 + int(math.log2(max(1.0, min(pair.shape[2:]) / COARSEST))))
    flow = pair.new_zeros(1, 2, *pair.shape[2:])

    def window(values: Tensor) -> Tensor:
        summed, deviation = values.sum(1, keepdim=True), (WINDOW / 2, WINDOW / 2)
        return gaussian_blur2d(summed, 2 * WINDOW + 1, deviation, border_type="replicate")

    for now, then in (level.split(1) for level in reversed(build_pyramid(pair, levels))):
        flow = _enlarge(flow, *now.shape[2:])
        gx, gy = spatial_gradient(now).unbind(2)
        xx, xy, yy = window(gx * gx) + STIFFNESS, window(gx * gy), window(gy * gy) + STIFFNESS
        points, size = _grid(*now.shape[2:], now), now.new_tensor([now.shape[3], now.shape[2]])[:, None, None]
        for _ in range(REPEATS):
            found = points + flow[0]
            seen = ((found >= 0) & (found <= size)).all(0)
            error = (now - _look_up(then[0], found)) * seen
            ex, ey = window(gx * error), window(gy * error)
            step = torch.cat([yy * ex - xy * ey, xx * ey - xy * ex], 1) / (xx * yy - xy * xy)
            flow = flow + step.clamp(-1, 1)
    return _enlarge(flow, height, width)[0]


def _check_frames(frame: Tensor, other: Tensor) -> None:
    if frame.ndim != 3 or frame.shape[0] != 3 or frame.shape != other.shape:
        raise ValueError(
            f"got frames of shapes {tuple(frame.shape)} and {tuple(other.shape)}; both must be one [3, height, width]"
        )


def propagate(
    mask: Tensor, clip: Tensor, flow: Flow = lucas_kanade, on_frame: Callable[[int], None] | None = None
) -> Tensor:
    """Carry a mask of a clip's first frame along the clip's motion: one mask a frame, [T, H, W] of 0 and 1.

    mask: [H, W] in 0..1, what is above 0.5 counts; clip: [T, 3, H, W] in 0..1. flow: how motion is estimated. on_frame:
    called with the number of each frame that is done. Each pixel is followed back to the first frame, step by step, and
    finds there whether it is masked; so the mask is sampled once and does not blur. What is hidden for a while, or
    enters later, is not known to it. Raises ValueError for a mask of another size than the clip's.
    """
    if clip.ndim != 4 or mask.shape != clip.shape[2:]:
        raise ValueError(
            f"got a mask of shape {tuple(mask.shape)} for a clip of shape {tuple(clip.shape)}; it must be "
            "[height, width] of the clip's frames"
        )
    first = mask.float().to(clip.device)
    points = _grid(*mask.shape, clip)
    origin, masks = points, [(first > 0.5).float()]  # where in the first frame each pixel comes from
    for number in range(1, len(clip)):
        origin = _look_up(origin, points + flow(clip[number], clip[number - 1]))
        masks.append((_look_up(first[None], origin)[0] > 0.5).float())
        if on_frame is not None:
            on_frame(number)
    return torch.stack(masks)


class Raft:
    """RAFT (Teed and Deng, arXiv 2003.12039) in torchvision's form as a flow: frames that it takes, and back.

    network: torchvision's raft_large or raft_small with its weights; frames are brought to the device that it is on.
    """

    def __init__(self, network: torch.nn.Module):
        self.network = network.eval()

    @torch.no_grad()
    def __call__(self, frame: Tensor, other: Tensor) -> Tensor:
        """As `lucas_kanade`."""
        _check_frames(frame, other)
        height, width = frame.shape[1:]
        enlarged = max(1.0, RAFT_LEAST / min(height, width))
        size = tuple(math.ceil(enlarged * side / RAFT_MULTIPLE) * RAFT_MULTIPLE for side in (height, width))
        device = next(self.network.parameters()).device
        pair = interpolate(torch.stack([frame, other]).float().to(device), size, mode="bilinear", align_corners=False)
        now, then = (2 * pair - 1).split(1)
        return _enlarge(self.network(now, then)[-1].float(), height, width)[0].to(frame.device)


def load_raft(path: str | Path) -> Raft:
    """RAFT from a file of torchvision's weights, large or small (.pth or .safetensors); nothing is downloaded.

    Raises FileNotFoundError, ValueError for a file that holds something else, ImportError without torchvision.
    """
    try:
        from torchvision.models.optical_flow import raft_large, raft_small
    except ImportError as error:
        raise ImportError("the learned optical flow is torchvision's: pip install torchvision") from error
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        stored = Path(path).suffix == ".safetensors"
        weights = load_file(path) if stored else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the file's reader, which raises many kinds
        raise ValueError(f"{path} does not open as a file of weights ({error})") from error
    for build in (raft_large, raft_small):
        network = build(weights=None, progress=False)
        if isinstance(weights, dict) and network.state_dict().keys() == weights.keys():
            try:
                network.load_state_dict(weights)
            except RuntimeError:  # the other size has the same names
                continue
            return Raft(network)
    raise ValueError(f"{path} does not hold the weights of torchvision's raft_large or raft_small")
