"""The text-to-image model's part of `train.py`: its UNet from nothing, on single frames of the captioned clips.

The text encoder is the text-to-video model's, frozen, and the frames are those that `captioned` has encoded, so that
nothing is rendered again.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..pipelines.denoiser import EPS, DiscreteTimes, discrete_denoised
from . import text
from .models import IMAGE_WEIGHTS, read_weights
from .text_to_image import MOTION, alphas_cumprod, build_image_unet
from .trainer import OBJECT_WEIGHT, Trainer, draw_sigmas, load_cache, seeded

log = logging.getLogger(__name__)

# ln sigma of the training noise: normal, but for a share that is uniform over the schedule's range.
P_MEAN, P_STD, WIDE = 0.0, 1.4, 0.15
STILL = 0.5  # share of captions without their words of motion
UNCONDITIONAL = 0.1  # share of pictures with the empty caption, for guidance
LEVELS = DiscreteTimes(alphas_cumprod())


def draw_pictures(data: dict[str, Tensor], count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A frame, drawn at random, of each of `count` random clips, with one of the clip's captions.

    data: clips as `train.py captioned` leaves them. Returns latents [n, 4, h, w], mask [n, h, w], tokens [n, length].
    """
    clips, frames = data["latents"].shape[:2]
    clip = torch.randint(clips, (count,), generator=generator)
    frame = torch.randint(frames, (count,), generator=generator)
    said = torch.randint(data["tokens"].shape[1], (count,), generator=generator)
    return {
        "latents": data["latents"][clip, frame],
        "mask": data["mask"][clip, frame],
        "tokens": data["tokens"][clip, said].long(),
    }


def motion_tokens(tokenizer) -> Tensor:
    """The tokens of the words of motion, each a token of its own."""
    return torch.tensor([tokenizer.convert_tokens_to_ids(word + "</w>") for word in MOTION])


def drop_tokens(tokens: Tensor, dropped: Tensor, end: int) -> Tensor:
    """Rows of tokens [n, length] without those in `dropped` [m], filled up with the end token."""
    gone = torch.isin(tokens, dropped)
    kept_first = gone.to(torch.uint8).sort(dim=1, stable=True).indices
    return tokens.masked_fill(gone, end).gather(1, kept_first)


def draw_levels(n: int, generator: torch.Generator) -> Tensor:
    """Noise levels [n] inside the schedule's range, each of the two distributions stratified over the batch."""
    low, high = LEVELS.sigma_range
    narrow = draw_sigmas(n, generator, P_MEAN, P_STD, wide=0.0).clamp(low, high)
    uniform = low * (high / low) ** ((torch.arange(n) + torch.rand(n, generator=generator)) / n)
    return torch.where(torch.rand(n, generator=generator) < WIDE, uniform, narrow)


def text_to_image_loss(
    unet, text_encoder, batch: dict[str, Tensor], motion: Tensor, empty: Tensor, generator: torch.Generator
) -> Tensor:
    """The squared error of v under a caption, the object counts more; the network predicts eps.

    batch: what `draw_pictures` returns. motion: the tokens of the words of motion; empty: those [length] of the empty
    caption.
    """
    clean, device = batch["latents"].float(), batch["latents"].device
    n, empty = len(clean), empty.to(device)
    still = torch.rand(n, generator=generator).to(device) < STILL
    without = drop_tokens(batch["tokens"], motion.to(device), int(empty[-1]))
    tokens = torch.where(still[:, None], without, batch["tokens"])
    drop = torch.rand(n, generator=generator).to(device) < UNCONDITIONAL
    context = text_encoder(torch.where(drop[:, None], empty, tokens)).last_hidden_state

    def network(x: Tensor, time: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return unet(x, time, context, return_dict=False)[0]

    sigma = draw_levels(n, generator).to(device)
    s = sigma[:, None, None, None]
    x = clean + s * torch.randn(clean.shape, generator=generator).to(device)
    denoised = discrete_denoised(network, x, sigma, LEVELS, EPS)
    # v-loss (arXiv 2202.00512, section 4): the error of v is sqrt(sigma^2 + 1) times that of eps, whose error is that
    # of the denoised estimate over sigma.
    error = torch.sqrt(s**2 + 1) / s * (denoised - clean)
    weight = 1 + OBJECT_WEIGHT * batch["mask"].float()[:, None]
    return (weight * error**2).mean() / weight.mean()


def train_text_to_image(args, rank: int, device: torch.device) -> None:
    from .keys import image_from_checkpoint

    torch.manual_seed(args.seed)  # all workers start from the same weights
    unet = build_image_unet()
    if args.start is not None:
        unet.load_state_dict(image_from_checkpoint(read_weights(args.start)))
    _, _, text_encoder, tokenizer = text.load_text_components()
    unet, text_encoder = unet.to(device).train(), text_encoder.to(device)
    path = args.folder / "text_to_image.pt"
    trainer = Trainer({"unet": unet}, path, args.lr or 1e-3, args.minutes, rank, steps=args.steps)
    data = load_cache(args.folder / "captioned")
    motion, empty = motion_tokens(tokenizer), text.tokens(tokenizer, [""])[0]
    network = torch.compile(unet, dynamic=False) if args.compile else unet
    count = args.batch * data["latents"].shape[1]  # as many pictures as there are frames in the clips of a batch
    generator = seeded(args, rank, trainer.step)
    while (share := trainer.progress()) < 1:
        batch = {key: value.to(device) for key, value in draw_pictures(data, count, generator).items()}
        trainer.update(text_to_image_loss(network, text_encoder, batch, motion, empty, generator), share)
    trainer.save()


def export_image(args, rank: int, device: torch.device) -> None:
    """Write the UNet's moving average, in half precision and the checkpoint layout, to a safetensors file."""
    from safetensors.torch import save_file

    from .keys import image_to_checkpoint

    state = torch.load(args.folder / "text_to_image.pt", map_location="cpu")
    weights = image_to_checkpoint(state["ema"]["unet"])
    save_file({key: value.half().contiguous() for key, value in weights.items()}, IMAGE_WEIGHTS)
    log.info("%s: %.1f MB, %d steps", IMAGE_WEIGHTS, IMAGE_WEIGHTS.stat().st_size / 1e6, state["step"])
