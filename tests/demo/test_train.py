"""The training script: its loss is EDM's in the sampler's own preconditioning, and it resumes where it stopped."""

import math
from types import SimpleNamespace

import pytest
import torch

from rewind.demo import train
from rewind.demo import world as W
from rewind.demo.models import SCALING_FACTOR, WEIGHTS, build_vae, load_components
from rewind.pipelines.denoiser import edm_scalings


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch():
    n = 6
    return {
        "latents": torch.randn(n, 8, 4, 12, 12, generator=generator()),
        "noisy": torch.randn(n, 4, 12, 12, generator=generator(1)),
        "level": torch.full((n,), 0.1),
        "image": torch.zeros(n, 3, 32, 32),
        "bucket": torch.full((n,), 80.0),
        "mask": torch.rand(n, 8, 12, 12, generator=generator(2)),
    }


class KnowsTheAnswer:
    """Answers with the network output that makes D the clean latents, by the samplers' own scalings."""

    def __init__(self, clean, offset=0.0):
        self.clean, self.offset, self.sigmas, self.conditions, self.ids = clean, offset, [], [], []

    def __call__(self, model_input, timestep, embedding, added, return_dict):
        sigma = torch.exp(4 * timestep.double())
        self.sigmas += sigma.tolist()
        self.conditions.append(model_input[:, :, 4:])
        self.ids.append(added)
        c_skip, c_out, c_in, _ = (c[:, None, None, None, None] for c in edm_scalings(sigma))
        x = model_input[:, :, :4] / c_in
        return ((self.clean - c_skip * x) / c_out + self.offset,)


def encoder(images):
    return SimpleNamespace(image_embeds=torch.ones(len(images), 64))


def test_the_loss_is_zero_for_the_denoiser_that_knows_the_answer_and_the_error_squared_else(batch):
    for offset, expected in ((0.0, 0.0), (0.5, 0.25)):
        unet = KnowsTheAnswer(batch["latents"], offset)
        loss = train.unet_loss(unet, encoder, batch, generator())
        assert float(loss) == pytest.approx(expected, abs=1e-3)


def test_the_noise_covers_the_samplers_range_and_conditions_are_dropped_sometimes(batch):
    unet, draw = KnowsTheAnswer(batch["latents"]), generator(4)
    for _ in range(300):
        train.unet_loss(unet, encoder, batch, draw)
    sigmas = torch.tensor(unet.sigmas).log()
    assert sigmas.min() < math.log(0.01) and sigmas.max() > math.log(400)
    assert abs(sigmas.median() - train.P_MEAN) < 0.3
    conditions, ids = torch.cat(unet.conditions), torch.cat(unet.ids)
    dropped = (conditions == 0).flatten(1).all(1).float().mean()
    assert 0.06 < dropped < 0.14
    assert set(ids[:, 1].tolist()) == {80.0, float(W.UNSPECIFIED_MOTION)} and set(ids[:, 0].tolist()) == {6.0}
    clean = (conditions[:6] * SCALING_FACTOR - batch["latents"][:, :1]).abs().flatten(1).amax(1) < 1e-4
    noisy = (conditions[:6] * SCALING_FACTOR - batch["noisy"][:, None]).abs().flatten(1).amax(1) < 1e-4
    assert (clean | noisy | (conditions[:6] == 0).flatten(1).all(1)).all()


def test_it_resumes_with_weights_average_optimizer_and_step(tmp_path):
    def trainer(steps):
        torch.manual_seed(0)
        return train.Trainer({"net": torch.nn.Linear(3, 2)}, tmp_path / "net.pt", 1e-2, 1, steps=steps)

    def run(one):
        while (share := one.progress()) < 1:
            x = torch.ones(4, 3) * (1 + one.step)
            one.update((one.modules["net"](x) ** 2).mean(), share)
        return one

    straight = run(trainer(8))
    half = trainer(8)
    half.steps = 4
    half.progress = lambda: half.step / 8 if half.step < 4 else 1.0
    run(half).save()
    resumed = trainer(8)
    assert resumed.step == 4
    run(resumed)
    for a, b in zip(straight.parameters, resumed.parameters):
        assert torch.equal(a, b)
    for key, value in straight.ema["net"].items():
        assert torch.equal(value, resumed.ema["net"][key])


def test_crops_keep_the_object_in_sight_and_pixels_and_mask_together():
    scene = W.sample(20, generator(3), W.World(frames=1, empty=0.0))
    frames, mask = W.render(scene)
    crops, masks = train._crops(frames, mask, scene, 48, generator())
    assert crops.shape == (20, 1, 3, 48, 48) and masks.shape == (20, 1, 48, 48)
    assert ((masks > 0.5).flatten(1).sum(1) > 30).float().mean() > 0.9
    nose = (crops.amin(2) > 0.96) & (masks > 0.99)
    assert nose.flatten(1).any(1).float().mean() > 0.6


def test_the_vae_starts_as_one_that_does_not_mix_frames():
    torch.manual_seed(0)
    vae = build_vae()
    latents = torch.randn(1, 3, 4, 4, 4, generator=generator())
    changed = latents.clone()
    changed[:, 1] += 1

    def moved():
        with torch.no_grad():
            return (train.decode(vae, latents) - train.decode(vae, changed)).abs().amax((0, 2, 3, 4)) > 1e-3

    assert moved().all()
    train._start_temporal_layers_as_identity(vae)
    # What is left between frames is the temporal layers' GroupNorm, whose statistics run over the whole clip.
    for module in vae.decoder.modules():
        if module.__class__.__name__ == "TemporalResnetBlock":
            module.norm1, module.norm2 = torch.nn.Identity(), torch.nn.Identity()
    assert moved().tolist() == [False, True, False]


@pytest.mark.parametrize("stills", [[], ["--stills"]])
def test_the_decoders_phase_leaves_the_latents_as_they_are(tmp_path, stills):
    words = ["decoder", *stills, "--steps", "1", "--workers", "1", "--folder", str(tmp_path), "--start", str(WEIGHTS)]
    train.main(words)
    before, after = load_components()[1].state_dict(), train.load_vae(tmp_path).state_dict()
    changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"decoder"}
