"""The reference settings against an independent derivation of the authors' update, written from their formulas."""

import torch
from denoisers import Network, clip

from rewind.pipelines.denoiser import karras_sigmas, truncate_sigmas
from rewind.pipelines.videoshop.inversion import sample_edm_inversion
from rewind.pipelines.videoshop.latents import normalise, rescale, whiten_condition
from rewind.pipelines.videoshop.settings import REFERENCE


def authors_inversion(network, latents, sigmas, noise):
    """num / den as their scheduler computes them, the model input as their loop does (sigmas ascending from 0)."""
    current = original = latents
    for sigma_current, sigma_prev in zip(sigmas, sigmas[1:]):
        if sigma_current > 1:
            model_input = original + (current - original) / sigma_current * sigma_prev
        else:
            model_input = original + noise * sigma_prev * latents.std()
        output = network.raw(model_input / (sigma_prev**2 + 1) ** 0.5, sigma_prev)
        c_skip, c_out = 1 / (sigma_prev**2 + 1), -sigma_prev / (sigma_prev**2 + 1) ** 0.5
        num = sigma_prev * current + (sigma_current - sigma_prev) * c_out * output
        den = (sigma_current - sigma_prev) * (1 - c_skip) + sigma_prev
        current = num / den
    return current


def test_the_schedule_is_theirs():
    sigmas = truncate_sigmas(karras_sigmas(25), REFERENCE.strength)
    theirs = [15.59, 10.10, 6.354, 3.870, 2.269, 1.273, 0.678, 0.339, 0.157, 0.0664, 0.0248, 0.0079, 0.0020, 0.0]
    assert len(sigmas) == 14
    assert torch.allclose(sigmas, torch.tensor(theirs, dtype=torch.float64), rtol=6e-3, atol=1e-4)


def test_the_update_is_theirs():
    latents, _ = normalise(clip() * 2 + 0.5, REFERENCE.normalise)
    noise = clip(seed=2)
    up = truncate_sigmas(karras_sigmas(25), REFERENCE.strength).flip(0)
    found = sample_edm_inversion(
        Network(0.7),
        latents,
        up,
        guess_above=REFERENCE.guess_above,
        guess_below=REFERENCE.guess_below,
        threshold=REFERENCE.threshold,
        noise=noise * latents.std(),  # their n carries the clip's deviation, which whitening makes 1
        disable=True,
    )
    expected = authors_inversion(Network(0.7), latents, up.tolist(), noise)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert abs(float(latents.std()) - 1) < 5e-3


def test_the_whitening_is_theirs():
    latents = clip(1, 5, 4, 6, 6, dtype=torch.float32) * 3 + 1  # their layout: B, T, C, h, w with B = 1
    flat = latents.reshape(latents.size(1), -1)
    mean, std = flat.mean(1), flat.std(1)
    expected = (latents - mean[None, :, None, None, None]) / (std[None, :, None, None, None] + 1e-6)
    assert torch.allclose(normalise(latents[0], "frame")[0], expected[0], atol=1e-6)
    image = latents[0, :1]
    theirs = (image - image.mean()) / (image.std() + 1e-6) / 0.18215
    assert torch.allclose(whiten_condition(image, 0.18215), theirs)


def test_the_final_rescale_is_theirs():
    output, image = clip(dtype=torch.float32) * 2 + 1, clip(1, 4, 6, 6, seed=5, dtype=torch.float32)
    first, picture = output[0].flatten(1), image[0].flatten(1)
    shape = (1, 4, 1, 1)
    theirs = (output - first.mean(1).view(shape)) / first.std(1).view(shape) * picture.std(1).view(shape)
    theirs = theirs + picture.mean(1).view(shape)
    assert torch.allclose(rescale(output, image), theirs, atol=1e-5)


def test_the_remaining_choices_are_theirs():
    assert (REFERENCE.first_guidance, REFERENCE.last_guidance, REFERENCE.augmentation) == (4.0, 4.0, 0.2)
    assert REFERENCE.normalise_condition and not REFERENCE.shared_augmentation and not REFERENCE.denormalise
