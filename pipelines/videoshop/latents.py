"""What happens to the latents before and after the sampling: normalising, rescaling, and preparing the first frame.

A clip in latent space is [T, C, h, w] (Stable Video Diffusion: the frames are the batch) or [B, C, T, h, w].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NORMALISATIONS = ("channel", "frame", "off")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def check_clip(x: Tensor) -> None:
    """ValueError unless x is a clip in latent space, not empty, and finite."""
    if x.ndim not in (4, 5):
        raise ValueError(f"got a latent of shape {tuple(x.shape)}; a clip is [T, C, h, w] or [B, C, T, h, w]")
    if x.numel() == 0:
        raise ValueError(f"got an empty latent of shape {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError(
            "the latent holds NaN or infinite values: the VAE overflowed (try it in float32) or was not trained"
        )


def _moments(x: Tensor, axes: tuple[int, ...], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation (as in the authors' code), in float32, broadcastable over x.

    mask: weights that broadcast over x; of 0 and 1, only where it is 1 counts. Where it is empty, everything does.
    """
    x = x.float()
    if mask is not None:
        w = mask.to(x).expand_as(x)
        w = torch.where(w.sum(axes, keepdim=True) > 0, w, 1.0)
        total = w.sum(axes, keepdim=True)
        mean = (w * x).sum(axes, keepdim=True) / total
        count = total - w.square().sum(axes, keepdim=True) / total  # of n weights of 1 it is n - 1
        variance = (w * (x - mean).square()).sum(axes, keepdim=True) / count.clamp_min(1e-6)
        return mean, torch.where(count > 1e-6, variance, 0.0).sqrt()
    mean = x.mean(axes, keepdim=True)
    count = x.numel() // mean.numel()
    deviation = x.std(axes, keepdim=True) if count > 1 else torch.zeros_like(mean)
    return mean, deviation


def _axes(x: Tensor, kind: str) -> tuple[int, ...]:
    """The axes that one statistic is taken over: all but the channel (and clip), or all but the frame (and clip)."""
    if kind == "channel":
        return (0, 2, 3) if x.ndim == 4 else (2, 3, 4)
    return (1, 2, 3) if x.ndim == 4 else (1, 3, 4)


@dataclass(frozen=True)
class Normalisation:
    """An affine map of a clip and its inverse: apply(x) = (x - shift) / scale.

    Both raise ValueError for a clip of other channels or frames than the one it was made from.
    """

    kind: str
    shift: Tensor
    scale: Tensor

    def _check(self, x: Tensor) -> None:
        if x.ndim != self.scale.ndim or any(own not in (1, side) for own, side in zip(self.scale.shape, x.shape)):
            raise ValueError(
                f"the normalisation was made for a clip whose statistics are {tuple(self.scale.shape)}, got a clip of "
                f"{tuple(x.shape)}: cut or join the clip before it is normalised, not after"
            )

    def apply(self, x: Tensor) -> Tensor:
        self._check(x)
        return ((x.float() - self.shift.to(x.device)) / self.scale.to(x.device)).to(x.dtype)

    def undo(self, x: Tensor) -> Tensor:
        self._check(x)
        return (x.float() * self.scale.to(x.device) + self.shift.to(x.device)).to(x.dtype)


def normalise(
    x: Tensor, kind: str = "channel", strength: float = 1.0, eps: float = 1e-6, mask: Tensor | None = None
) -> tuple[Tensor, Normalisation | None]:
    """Bring a clip to the unit variance that a model with sigma_data 1 was trained for, before it is inverted.

    x: [T, C, h, w] or [B, C, T, h, w] in MODEL space.
    kind: "channel": each channel divided by its standard deviation over all frames and pixels; the mean stays (paper,
        section on latent normalisation; that it keeps the mean is inferred: its formula was not to be had).
        "frame": mean and standard deviation of each frame over channels and pixels together (the authors' code).
        "off": nothing.
    strength: 0..1, shift * strength and scale ** strength; 0 returns x itself, bit for bit.
    eps: added to the standard deviation, so that a constant channel gives no NaN (the authors' 1e-6).
    mask: of latents (see `masks.latent_mask`), where the statistics are taken; all of x is normalised by them (ours).
    Returns the normalised clip and the map, whose `undo` brings it back; None where nothing was done.
    """
    if kind not in NORMALISATIONS:
        raise ValueError(f'normalisation is "{kind}"; it must be one of {", ".join(NORMALISATIONS)}')
    if not 0 <= strength <= 1:
        raise ValueError(f"the strength of the normalisation is {strength}; it must be 0 to 1")
    check_clip(x)
    if kind == "off" or strength == 0:
        return x, None
    mean, deviation = _moments(x, _axes(x, kind), mask)
    shift = torch.zeros_like(mean) if kind == "channel" else mean * strength
    # A channel that does not vary at all carries nothing to bring to unit variance: it is left alone.
    deviation = torch.where(deviation > eps, deviation + eps, torch.ones_like(deviation))
    applied = Normalisation(kind, shift, deviation**strength)
    return applied.apply(x), applied


def _first_frame(x: Tensor) -> Tensor:
    return x[:1] if x.ndim == 4 else x[:, :, :1]


def rescale(
    x: Tensor, reference: Tensor, strength: float = 1.0, eps: float = 1e-6, mask: Tensor | None = None
) -> Tensor:
    """Give a generated clip the colours of the edited first frame (paper, section on latent rescaling).

    Per channel: x_out = (x - mu_0) / sigma_0 * sigma_img + mu_img, with mu_0, sigma_0 of the generated FIRST frame and
    mu_img, sigma_img of the reference's first frame (the edited picture's latents, without augmentation noise).
    x, reference: [T, C, h, w] or [B, C, T, h, w] in the same space, of equal channels. strength: 0..1, linear between
    x and the result; 0 returns x itself. A channel whose first frame is constant (deviation below eps) is shifted, not
    scaled: the frames after it would be blown up without bound (ours; the authors' code has no such guard).
    mask: of latents (see `masks.latent_mask`): both statistics are taken inside its first frame, x is changed as far as
    it says, and not at all where it is 0 (ours). Raises ValueError for another kind of latents, and for a mask whose
    first frame is empty.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"the strength of the rescaling is {strength}; it must be 0 to 1")
    check_clip(x)
    check_clip(reference)
    if x.ndim != reference.ndim or x.shape[1] != reference.shape[1]:
        raise ValueError(
            f"cannot rescale a clip of shape {tuple(x.shape)} to a picture of shape {tuple(reference.shape)}: "
            "both must come from the same VAE"
        )
    if strength == 0:
        return x
    first, target, region = (v if v is None else _first_frame(v) for v in (x, reference, mask))
    if region is not None and target.shape != first.shape:
        raise ValueError(
            f"the edited picture's latent is {tuple(target.shape)}, the clip's first frame {tuple(first.shape)}: "
            "with a mask both must be of one size"
        )
    if region is not None and not region.any():
        raise ValueError("the mask's first frame is empty: there is nothing that the edited frame's colours belong to")
    axes = _axes(x, "channel")
    (mu_0, sigma_0), (mu_img, sigma_img) = (_moments(v.to(x.device), axes, region) for v in (first, target))
    gain = torch.where(sigma_0 > eps, sigma_img / sigma_0.clamp(min=eps), torch.ones_like(sigma_0))
    scaled = (x.float() - mu_0) * gain + mu_img
    if mask is None:
        return torch.lerp(x.float(), scaled, strength).to(x.dtype)
    share = strength * mask.to(scaled)
    return torch.where(share > 0, torch.lerp(x.float(), scaled, share).to(x.dtype), x)


def augment(pixels: Tensor, level: float, noise: Tensor) -> Tensor:
    """The first frame with SVD's augmentation noise: pixels in -1..1 (the model's own range) plus level times noise."""
    return pixels + level * noise.to(pixels) if level else pixels


def whiten_condition(latent: Tensor, scaling_factor: float, eps: float = 1e-6) -> Tensor:
    """The authors' whitening of the SOURCE condition: mean 0, deviation 1 over everything, then unscaled again.

    latent: [1, C, h, w], the unscaled latents of the first frame. Their released code does this in the inversion only.
    """
    return (latent - latent.mean()) / (latent.std() + eps) / scaling_factor


def clip_preprocess(images: Tensor, size: int) -> Tensor:
    """CLIP's preparation of images [n, 3, H, W] in 0..1 as the host does it: [n, 3, size, size].

    The shorter side is resized to `size` (bicubic, antialiased), the centre cropped, the values rounded to 8 bits,
    CLIP's mean and deviation applied.
    """
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        shape = (round(scale * height), round(scale * width))
        images = torch.nn.functional.interpolate(images, size=shape, mode="bicubic", antialias=True)
        top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
        images = images[..., top : top + size, left : left + size]
    images = torch.clip(255.0 * images, 0, 255).round() / 255.0
    mean, deviation = (torch.tensor(v).to(images)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / deviation
