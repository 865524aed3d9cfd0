"""The reference settings against the authors' job, written again from what their code computes.

Nothing of ours is used on their side but CLIP's preparation of the picture (theirs is bilinear) and, in the whole job,
the random draws; their denoising is diffusers' own scheduler.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_svd
import torch
from denoisers import Network, clip, relative

from rewind.pipelines.denoiser import karras_sigmas, truncate_sigmas
from rewind.pipelines.videoshop.inversion import sample_edm_inversion
from rewind.pipelines.videoshop.latents import clip_preprocess, normalise, rescale, whiten_condition
from rewind.pipelines.videoshop.pipeline import VideoshopPipeline
from rewind.pipelines.videoshop.settings import REFERENCE

SCALE = 0.18215


def authors_inversion(output, latents, sigmas, noise):
    """num / den as in their scheduler's inverse step, the model input as in their loop; sigmas ascending from 0.

    output(x, sigma) is the network's raw output on c_in x.
    """
    current = original = latents
    for sigma_current, sigma_prev in zip(sigmas, sigmas[1:]):
        if sigma_current > 1:
            model_input = original + (current - original) / sigma_current * sigma_prev
        else:
            model_input = original + noise * sigma_prev
        f = output(model_input / (sigma_prev**2 + 1) ** 0.5, sigma_prev)
        c_skip, c_out = 1 / (sigma_prev**2 + 1), -sigma_prev / (sigma_prev**2 + 1) ** 0.5
        num = sigma_prev * current + (sigma_current - sigma_prev) * c_out * f
        den = (sigma_current - sigma_prev) * (1 - c_skip) + sigma_prev
        current = num / den
    return current


def whitened(latents):
    """Each frame to mean 0 and deviation 1, over all it holds."""
    flat = latents.reshape(len(latents), -1)
    mean, std = flat.mean(1), flat.std(1)
    return (latents - mean[:, None, None, None]) / (std[:, None, None, None] + 1e-6)


def rescaled(output, image):
    """Each channel from the output's first frame's statistics to the picture's."""
    first, picture, shape = output[0].flatten(1), image[0].flatten(1), (1, 4, 1, 1)
    output = (output - first.mean(1).view(shape)) / first.std(1).view(shape)
    return output * picture.std(1).view(shape) + picture.mean(1).view(shape)


# --- the parts -------------------------------------------------------------------------------------------------------


def test_the_update_is_theirs():
    """Their n is scaled by the whitened clip's deviation, which tends to 1 with its size; ours is n itself."""
    latents, _ = normalise(clip() * 2 + 0.5, REFERENCE.normalise)
    noise = clip(seed=2) * latents.std()
    up = truncate_sigmas(karras_sigmas(25), REFERENCE.strength).flip(0)
    found = sample_edm_inversion(
        Network(0.7),
        latents,
        up,
        guess_above=REFERENCE.guess_above,
        guess_below=REFERENCE.guess_below,
        threshold=REFERENCE.threshold,
        noise=noise,
        disable=True,
    )
    torch.testing.assert_close(found, authors_inversion(Network(0.7).raw, latents, up.tolist(), noise))
    assert len(up) == 14 and float(up[-1]) == pytest.approx(15.59, abs=0.01)
    # Their first 8 calls are at random noise, the last 5 at extrapolated noise.
    assert sum(low <= REFERENCE.threshold for low in up[:-1].tolist()) == 8


def test_the_whitened_clip_has_nearly_their_deviation_of_1():
    """A clip of Stable Video Diffusion's own size: the scale of n that is left out is within 2e-5 of 1."""
    assert float(whitened(torch.randn(14, 4, 72, 128, generator=torch.Generator().manual_seed(0))).std()) == (
        pytest.approx(1, abs=2e-5)
    )


def test_the_whitening_is_theirs():
    latents = clip(dtype=torch.float32) * 3 + 1
    torch.testing.assert_close(normalise(latents, "frame")[0], whitened(latents), rtol=1e-5, atol=1e-6)
    image = latents[:1]
    theirs = (image - image.mean()) / (image.std() + 1e-6) / SCALE
    torch.testing.assert_close(whiten_condition(image, SCALE), theirs)


def test_the_final_rescale_is_theirs():
    output, image = clip(dtype=torch.float32) * 2 + 1, clip(1, 4, 3, 5, seed=5, dtype=torch.float32)
    torch.testing.assert_close(rescale(output, image), rescaled(output, image), rtol=1e-5, atol=1e-5)


# --- the whole job ---------------------------------------------------------------------------------------------------


class Authors:
    """Their job on diffusers' modules: step by step as in their run.py, with guidance on the network's output."""

    def __init__(self, unet, vae, image_encoder):
        from diffusers import EulerDiscreteScheduler

        self.unet, self.vae, self.image_encoder = unet, vae, image_encoder
        self.scheduler = EulerDiscreteScheduler(
            prediction_type="v_prediction",
            timestep_type="continuous",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
            timestep_spacing="leading",
        )
        self.ids = torch.tensor([[6.0, 127.0, 0.2]])

    def encode(self, pixels):
        return self.vae.encode(pixels).latent_dist.mode()

    def embed(self, image):
        return self.image_encoder(clip_preprocess(image[None], 32)).image_embeds[:, None]

    def __call__(self, video, edited, noises, n, steps):
        self.scheduler.set_timesteps(steps)
        t_start = steps - int(steps * 0.55)
        pixels, edited_pixels = 2 * video - 1, 2 * edited[None] - 1
        latents = whitened(self.encode(pixels) * SCALE)
        image = self.encode(pixels[:1] + 0.2 * noises[0])
        image = (image - image.mean()) / (image.std() + 1e-6) / SCALE
        embedding, frames = self.embed(video[0]), len(video)

        def output(scaled, sigma):
            stacked = torch.cat([scaled, image.expand(frames, -1, -1, -1)], 1)[None]
            time = 0.25 * torch.tensor([sigma]).log()
            return self.unet(stacked, time, embedding, self.ids, return_dict=False)[0][0]

        sigmas = self.scheduler.sigmas[t_start:].flip(0).tolist()
        x = authors_inversion(output, latents, sigmas, n)

        image, embedding = self.encode(edited_pixels + 0.2 * noises[1]), self.embed(edited)
        images = torch.cat([torch.zeros_like(image), image])[:, None].expand(-1, frames, -1, -1, -1)
        embeddings = torch.cat([torch.zeros_like(embedding), embedding])
        self.scheduler.set_begin_index(t_start)
        for t in self.scheduler.timesteps[t_start:]:
            scaled = self.scheduler.scale_model_input(x, t)[None].expand(2, -1, -1, -1, -1)
            stacked = torch.cat([scaled, images], 2)
            f = self.unet(stacked, t, embeddings, self.ids.expand(2, -1), return_dict=False)[0]
            f = f[0] + 4.0 * (f[1] - f[0])
            x = self.scheduler.step(f, t, x).prev_sample
        return rescaled(x, self.encode(edited_pixels) * SCALE)


@torch.no_grad()
def test_the_whole_job_is_theirs():
    modules = tiny_svd.components()
    video, edited = tiny_svd.video(), tiny_svd.video(4)[0]
    settings = replace(REFERENCE, steps=11)  # int(6.05) of them, up to 15.6; two are above the threshold
    result = VideoshopPipeline(*modules)(video, edited, settings, torch.Generator().manual_seed(5), progress=False)
    generator = torch.Generator().manual_seed(5)
    noises, n = torch.randn(2, *video.shape[1:], generator=generator), torch.randn(4, 4, 4, 6, generator=generator)
    wanted = Authors(*modules)(video, edited, noises, n, steps=11)
    assert relative(result.latents, wanted) < 1e-5
    assert result.evaluations == {"inversion": 6, "denoising": 12}
    for change in ({"threshold": 9.0}, {"normalise_condition": False}, {"rescale": 0.0}, {"last_guidance": 3.5}):
        other = replace(settings, **change)
        other = VideoshopPipeline(*modules)(video, edited, other, torch.Generator().manual_seed(5), progress=False)
        assert relative(other.latents, wanted) > 1e-3, change
