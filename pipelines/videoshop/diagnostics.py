"""How good an inversion is: straightness of its path, whiteness of the noise it found, error of the way back."""

from __future__ import annotations

import torch
from torch import Tensor


def _frames_first(x: Tensor) -> Tensor:
    """[T, C, h, w] or [B, C, T, h, w] as [T, everything else], in float64."""
    clip = x if x.ndim == 4 else x.movedim(2, 0)
    return clip.flatten(1).double()


def step_cosines(trajectory: Tensor) -> Tensor:
    """Cosine similarity of the directions of every two steps, [steps, steps].

    trajectory: [steps + 1, *latent], from clean to noise. The paper's extrapolation rests on values near 1 (it
    reports a mean of 0.93 over all pairs and 0.99 over neighbours on Stable Video Diffusion). A step of no length
    counts as 0.
    """
    steps = torch.nn.functional.normalize(trajectory.flatten(1).double().diff(dim=0), dim=1)
    return steps @ steps.T


def inverted_noise(latent: Tensor, clean: Tensor, sigma: float, signal: float) -> Tensor:
    """The noise n of latent = signal * clean + sigma * n."""
    return (latent - signal * clean) / sigma


def noise_statistics(noise: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Per frame: the noise's standard deviation (1 in fresh noise) and its correlation with the clean clip (0 there).

    noise, clean: [T, C, h, w] or [B, C, T, h, w]; the results are [T]. A constant frame counts as uncorrelated.
    """
    n, x = _frames_first(noise), _frames_first(clean)
    deviation = n.std(1)
    n, x = n - n.mean(1, keepdim=True), x - x.mean(1, keepdim=True)
    return deviation, torch.nn.functional.cosine_similarity(n, x, dim=1)


def frame_errors(x: Tensor, reference: Tensor) -> Tensor:
    """Relative error of each frame, |x - reference| / |reference|, [T]; both [T, C, h, w] or [B, C, T, h, w]."""
    x, reference = _frames_first(x), _frames_first(reference)
    return (x - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-12)
