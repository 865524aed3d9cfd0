"""Train the embedded models from scratch on the synthetic world.

    python -m rewind.demo.train vae   --minutes 20      the VAE, encoder and temporal decoder
    python -m rewind.demo.train cache --clips 5120      render and encode the training clips once
    python -m rewind.demo.train unet  --minutes 120     the video UNet and the image encoder
    python -m rewind.demo.train decoder --minutes 20    more of the decoder alone (the latents stay what they are)
    python -m rewind.demo.train export                  the one safetensors file that both faces read
    python -m rewind.demo.train captioned               render, encode and caption the text models' clips once
    python -m rewind.demo.train text-to-video           the video UNet from the shipped one, and its text encoder
    python -m rewind.demo.train export-text             their safetensors file
    python -m rewind.demo.train text-to-image           the image UNet, on frames of the captioned clips
    python -m rewind.demo.train export-text-to-image    its safetensors file
    python -m rewind.demo.train one-shot                EI²'s weights of one clip, tuned on the shipped model

Every command resumes from its own checkpoint in --folder (weights, moving average, optimizer, step) and saves on the
way. On a CPU it runs one single-threaded worker a core, with the gradients averaged each step; on a GPU one worker.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import train_image, train_one_shot, train_text
from . import world as W
from .models import (
    PICTURE_MEAN,
    PICTURE_STD,
    SCALING_FACTOR,
    ImageToVideoConfig,
    build_image_encoder,
    build_unet,
    build_vae,
    load_components,
)
from .trainer import Trainer, draw_sigmas, edm_loss, load_cache, seeded

log = logging.getLogger(__name__)

LATENT_NOISE = 0.10  # added before decoding in training: the decoder then forgives a sampler's small errors
P_MEAN, P_STD = 0.3, 1.5  # ln sigma of the UNet's training noise, normal ...
WIDE = 0.15  # ... but for this share, which is uniform over the whole of SVD's range: samplers start at 700


def _load_start(modules: dict[str, torch.nn.Module], path: Path) -> None:
    """The weights of an exported file; a checkpoint in the training folder, if there is one, replaces them."""
    from safetensors.torch import load_file

    from .keys import from_checkpoint

    parts = from_checkpoint({name: tensor.float() for name, tensor in load_file(path).items()})
    for name, module in modules.items():
        module.load_state_dict(parts[name])


# --- the VAE ----------------------------------------------------------------------------------------------------------


def encode(vae, pixels: Tensor) -> Tensor:
    """The posterior's mean in model space, [..., 4, H/8, W/8], of pixels [..., 3, H, W] in -1..1."""
    moments = vae.encoder(pixels.flatten(0, -4)).float()
    return (moments[:, :4] * SCALING_FACTOR).unflatten(0, pixels.shape[:-3])


def decode(vae, latents: Tensor) -> Tensor:
    """Pixels [n, T, 3, H, W] in -1..1 of clips of latents [n, T, 4, h, w] in model space."""
    n, frames = latents.shape[:2]
    only_video = torch.zeros(n, frames, dtype=latents.dtype, device=latents.device)
    pixels = vae.decoder(latents.flatten(0, 1) / SCALING_FACTOR, num_frames=frames, image_only_indicator=only_video)
    return pixels.unflatten(0, (n, frames))


def _crops(
    frames: Tensor, mask: Tensor, scene: W.Scene, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Square crops around the object, the same for all frames of a clip."""
    centre = scene.position[:, 0] + 48 * (torch.rand(len(scene), 2, generator=generator) - 0.5)
    corner = (centre - size / 2).clamp(0, frames.shape[-1] - size).long().tolist()
    pick = [(slice(None), slice(None), slice(y, y + size), slice(x, x + size)) for x, y in corner]
    return torch.stack([f[p] for f, p in zip(frames, pick)]), torch.stack([m[p[1:]] for m, p in zip(mask, pick)])


def vae_loss(vae, pixels: Tensor, mask: Tensor, train_encoder: bool = True) -> Tensor:
    """Reconstruction (L1, squared, gradients; the object counts more) and the shape of the latents."""
    with torch.set_grad_enabled(train_encoder):
        latents = encode(vae, pixels)
    noisy = latents + LATENT_NOISE * torch.rand(len(pixels), 1, 1, 1, 1).to(pixels) * torch.randn_like(latents)
    error = decode(vae, noisy).float() - pixels
    weight = 1 + 3 * F.max_pool2d(mask, 5, 1, 2)[:, :, None]
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    loss = (weight * (error.abs() + 4 * error**2)).mean() / weight.mean() + 0.5 * edges
    if train_encoder:
        small = (F.avg_pool2d(pixels.flatten(0, 1), 8) - PICTURE_MEAN) / PICTURE_STD
        flat = latents.flatten(0, 1)
        detail = flat[:, 3]
        loss = loss + 0.1 * (flat[:, :3] - small).pow(2).mean() + 0.01 * (detail.mean() ** 2 + (detail.std() - 1) ** 2)
    return loss


def _start_temporal_layers_as_identity(vae) -> None:
    """Single frames then train the same function that clips see; the outer taps learn in the decoder's own phase."""
    for module in vae.decoder.modules():
        if isinstance(module, torch.nn.Conv3d) and module.kernel_size[0] == 3:
            module.weight.data[:, :, [0, 2]] = 0
    # The posterior's variance is never used (the mode is): a small constant.
    vae.encoder.conv_out.weight.data[4:] = 0
    vae.encoder.conv_out.bias.data[4:] = -10.0


def train_vae(args, rank: int, device: torch.device) -> None:
    torch.manual_seed(args.seed)  # all workers start from the same weights
    vae = build_vae()
    _start_temporal_layers_as_identity(vae)
    vae.to(device)
    decoder_only = args.command == "decoder"
    if args.start is not None:
        _load_start({"vae": vae}, args.start)
    if decoder_only:
        vae.encoder.requires_grad_(False)
        if args.start is None and not (args.folder / "decoder.pt").exists():
            vae.load_state_dict(torch.load(args.folder / "vae.pt")["ema"]["vae"])
    path = args.folder / f"{args.command}.pt"
    trainer = Trainer({"vae": vae}, path, args.lr or 1.5e-3, args.minutes, rank, 0.995, args.steps)
    generator = seeded(args, rank, trainer.step)
    while (share := trainer.progress()) < 1:
        # Two thirds of the time on single cropped frames, then whole frames; the decoder's own phase sees clips, or
        # whole frames where it is to learn other colours rather than time.
        whole = decoder_only or share > 0.6
        count, frames = (1, 8) if decoder_only and not args.stills else (4, 1) if whole else (12, 1)
        scene = W.sample(count, generator, W.World(frames=frames))
        pixels, mask = W.render(scene)
        if not whole:
            pixels, mask = _crops(pixels, mask, scene, 48, generator)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = vae_loss(vae, (pixels * 2 - 1).to(device), mask.to(device), train_encoder=not decoder_only)
        trainer.update(loss, share)
    trainer.save()


# --- the UNet ---------------------------------------------------------------------------------------------------------


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """CLIP's own preparation of images [n, 3, H, W] in 0..1 (bicubic, antialiased, normalised), as the host does it."""
    from ..pipelines.videoshop.latents import clip_preprocess

    return clip_preprocess(images, size)


def load_vae(folder: Path):
    """The trained VAE: the encoder of the first phase, the decoder of the latest; else the shipped one."""
    newest = next((path for path in (folder / "decoder.pt", folder / "vae.pt") if path.exists()), None)
    if newest is None:
        return load_components()[1]
    vae = build_vae()
    vae.load_state_dict(torch.load(newest, map_location="cpu")["ema"]["vae"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def make_cache(args, rank: int, device: torch.device) -> None:
    """Render and encode training clips, a file of 256 clips at a time; existing files are kept."""
    vae = load_vae(args.folder).to(device)
    workers = dist.get_world_size() if dist.is_initialized() else 1
    (args.folder / "cache").mkdir(exist_ok=True)
    for part in range(rank, math.ceil(args.clips / 256), workers):
        path = args.folder / "cache" / f"{part:04d}.pt"
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(7_000_000 + part)  # the training seeds
        scene = W.sample(256, generator)
        frames, mask = W.render(scene)
        level = torch.exp(torch.empty(256).uniform_(math.log(0.005), math.log(0.3), generator=generator))
        first = frames[:, :1] * 2 - 1
        noisy = first + level[:, None, None, None, None] * torch.randn(first.shape, generator=generator)
        pixels = torch.cat([frames * 2 - 1, noisy], 1)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            latents = torch.cat([encode(vae, piece.to(device)).cpu() for piece in pixels.split(8)])
        data = {"latents": latents[:, :-1].half(), "noisy": latents[:, -1].half(), "level": level}
        data |= {"image": clip_pixels(frames[:, 0], 32).half(), "bucket": scene.motion_bucket}
        data |= {"mask": F.avg_pool2d(mask, 8).half()}
        torch.save(data, path)
        log.info("clips %d to %d", part * 256, part * 256 + 255)


def unet_loss(unet, image_encoder, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """EDM's loss; a tenth of the clips lose the picture, a tenth its embedding, as guidance needs."""
    z, device = batch["latents"].float(), batch["latents"].device
    n, frames = z.shape[:2]

    def rand(*shape):
        return torch.rand(*shape, generator=generator).to(device)

    sigma = draw_sigmas(n, generator, P_MEAN, P_STD, WIDE).to(device)
    clean = rand(n) < 0.3  # no augmentation noise on the condition
    condition = torch.where(clean[:, None, None, None], z[:, 0], batch["noisy"].float()) / SCALING_FACTOR
    level = torch.where(clean, 0.0, batch["level"].float())
    drop = rand(n)  # 5 % lose the picture, 5 % the embedding, 5 % both
    condition = condition * (drop > 0.10)[:, None, None, None]
    embedding = image_encoder(batch["image"].float()).image_embeds[:, None]
    embedding = embedding * ((drop > 0.15) | ((drop > 0.05) & (drop <= 0.10)))[:, None, None]
    bucket = torch.where(rand(n) < 0.1, float(W.UNSPECIFIED_MOTION), batch["bucket"].float())
    added = torch.stack([torch.full_like(level, 6.0), bucket, level], 1)  # fps - 1, motion bucket, augmentation
    condition = condition[:, None].expand(-1, frames, -1, -1, -1)

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            timestep = 0.25 * sigma.log()
            return unet(torch.cat([x, condition], 2), timestep, embedding, added, return_dict=False)[0].float()

    return edm_loss(network, z, sigma, batch["mask"].float(), generator)


def train_unet(args, rank: int, device: torch.device) -> None:
    torch.manual_seed(args.seed)
    config = ImageToVideoConfig()
    unet, image_encoder = build_unet(config).to(device), build_image_encoder(config).to(device)
    modules = {"unet": unet.train(), "image_encoder": image_encoder}
    if args.start is not None:
        _load_start(modules, args.start)
    trainer = Trainer(modules, args.folder / "unet.pt", args.lr or 1e-3, args.minutes, rank, steps=args.steps)
    data = load_cache(args.folder / "cache")
    generator = seeded(args, rank, trainer.step)
    while (share := trainer.progress()) < 1:
        index = torch.randint(len(data["latents"]), (args.batch,), generator=generator)
        batch = {key: value[index].to(device) for key, value in data.items()}
        trainer.update(unet_loss(unet, image_encoder, batch, generator), share)
    trainer.save()


# --- one file ---------------------------------------------------------------------------------------------------------


def export(args, rank: int, device: torch.device) -> None:
    """Write the moving averages, in half precision and the checkpoint layout, to one safetensors file."""
    from safetensors.torch import save_file

    from .keys import to_checkpoint

    state = torch.load(args.folder / "unet.pt", map_location="cpu")
    parts = {"unet": state["ema"]["unet"], "vae": load_vae(args.folder).state_dict()}
    weights = to_checkpoint(parts | {"image_encoder": state["ema"]["image_encoder"]})
    save_file({key: value.half().contiguous() for key, value in weights.items()}, args.output)
    log.info("%s: %.1f MB, %d steps", args.output, args.output.stat().st_size / 1e6, state["step"])


COMMANDS = {
    "vae": train_vae,
    "decoder": train_vae,
    "cache": make_cache,
    "unet": train_unet,
    "export": export,
    "captioned": train_text.make_cache,
    "text-to-video": train_text.train_text_to_video,
    "export-text": train_text.export,
    "text-to-image": train_image.train_text_to_image,
    "export-text-to-image": train_image.export_image,
    "one-shot": train_one_shot.tune_one_shot,
}


def _worker(rank: int, workers: int, args) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if workers > 1:
        torch.set_num_threads(1)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
        dist.init_process_group("gloo", rank=rank, world_size=workers)
    COMMANDS[args.command](args, rank, device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--folder", type=Path, default=Path("demo/training"), help="checkpoints and cache")
    parser.add_argument("--minutes", type=float, default=60, help="wall-clock time of this run")
    parser.add_argument("--steps", type=int, default=None, help="train to this step instead: repeatable")
    parser.add_argument("--start", type=Path, default=None, help="begin from an exported file's weights")
    parser.add_argument("--clips", type=int, default=5120)
    parser.add_argument("--stills", action="store_true", help="the decoder's phase on single frames instead of clips")
    parser.add_argument(
        "--compile", action="store_true", help="text models: faster after minutes of compiling (text-to-video: a third)"
    )
    parser.add_argument("--batch", type=int, default=4, help="clips a worker and step; text-to-image: 8 pictures each")
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clip-seed", type=int, default=train_one_shot.CLIP_SEED, help="of the clip of one-shot")
    parser.add_argument(
        "--workers", type=int, default=None, help="default: one a core, one on a GPU, one to export or tune"
    )
    parser.add_argument("--port", type=int, default=29511)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("rewind_demo_svd.safetensors"))
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    single = torch.cuda.is_available() or args.command.startswith(("export", "one-shot"))
    workers = args.workers or (1 if single else os.cpu_count() or 1)
    if workers > 1:
        torch.multiprocessing.spawn(_worker, (workers, args), nprocs=workers)
    else:
        _worker(0, 1, args)


if __name__ == "__main__":
    main()
