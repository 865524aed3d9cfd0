"""The text models' part of `train.py`: captioned clips, the text-to-video UNet with its text encoder, their file.

The text-to-video model is the image-to-video model's architecture and begins from its weights: the tokens of the text
take the place of the image embedding as cross-attention context, the concatenated first frame is zeros, and the added
ids are what the host gives a MODEL of this class for a plain CONDITIONING.
"""

from __future__ import annotations

import logging
import math
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..pipelines.dreamix.families import PLAIN_IDS
from . import captions, text
from . import world as W
from .models import TEXT_WEIGHTS, build_unet, load_components
from .trainer import DRIFT_WEIGHT, Trainer, draw_sigmas, edm_loss, load_cache, seeded

log = logging.getLogger(__name__)

VARIANTS = 4  # captions a clip, each with other words left out
# ln sigma of the training noise. Words tell where the object is and where it goes only while the noise hides it, above
# a sigma of about 5, and its shape below that: the mean falls on the way from the first of these to the second.
P_MEAN, LAST_P_MEAN, P_STD, WIDE = 1.8, 0.3, 1.5, 0.1
# Frames of every second step's clips. A clip of any length says its shape once: as many frames in short clips, from the
# start of each, tell of four times the captions.
BRIEF = 2
UNCONDITIONAL = 0.1  # share of clips with the empty caption, for guidance
WAY_WEIGHT = 0.5  # of the readers' loss at the start; it falls to nothing


@torch.no_grad()
def make_cache(args, rank: int, device: torch.device) -> None:
    """Render, encode and caption training clips, a file of 256 clips at a time; existing files are kept."""
    from .train import encode, load_vae

    vae, tokenizer = load_vae(args.folder).to(device), text.load_tokenizer()
    workers = dist.get_world_size() if dist.is_initialized() else 1
    folder = args.folder / "captioned"
    folder.mkdir(exist_ok=True)
    for part in range(rank, math.ceil(args.clips / 256), workers):
        path = folder / f"{part:04d}.pt"
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(8_000_000 + part)  # the training seeds
        words = captions.draw_words(256, generator)
        frames, mask = W.render(captions.scenes(words, generator))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            latents = torch.cat([encode(vae, piece.to(device)).cpu() for piece in (frames * 2 - 1).split(8)])
        said = [captions.draw_caption(words, i, generator) for i in range(256) for _ in range(VARIANTS)]
        tokens = text.tokens(tokenizer, said).unflatten(0, (256, VARIANTS)).short()
        torch.save({"latents": latents.half(), "mask": F.avg_pool2d(mask, 8).half(), "tokens": tokens}, path)
        log.info("clips %d to %d", part * 256, part * 256 + 255)


class WayReaders(torch.nn.Module):
    """Linear readers on the UNet's transformers that tell how far each place lies along the caption's direction.

    "Moves right" is a product of three: the direction, the place and the time, of which the diffusion loss shows a
    network nothing before it has all three. The readers ask for the product of the first two, and of all three, at
    every place and frame; what they learn is dropped after the training (deep supervision).
    """

    def __init__(self, unet, tokenizer):
        from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel

        super().__init__()
        blocks = [module for module in unet.modules() if isinstance(module, TransformerSpatioTemporalModel)]
        self.readers = torch.nn.ModuleList(torch.nn.Conv2d(block.in_channels, 2, 1) for block in blocks)
        self.seen: dict[int, Tensor] = {}
        for index, block in enumerate(blocks):
            block.register_forward_hook(partial(self._see, index))
        self.words = torch.tensor([tokenizer.convert_tokens_to_ids(word + "</w>") for word in captions.DIRECTIONS])

    def _see(self, index: int, block, given, output) -> None:
        self.seen[index] = output[0]

    def loss(self, tokens: Tensor, frames: int) -> Tensor:
        """Mean squared error on what was seen since the last call. tokens: [n, length], as the network was told."""
        said = (tokens[:, :, None] == self.words.to(tokens)).any(1)  # [n, 4]
        angle = said.float().argmax(1) * math.pi / 2
        losses = []
        for index, reader in enumerate(self.readers):
            told = reader(self.seen[index].float()).unflatten(0, (-1, frames))  # [n, T, 2, h, w]
            y, x = (torch.linspace(-1, 1, side, device=tokens.device) for side in told.shape[-2:])
            way = angle.cos()[:, None, None] * x[None, None, :] + angle.sin()[:, None, None] * y[None, :, None]
            time = torch.linspace(-1, 1, frames, device=tokens.device)
            wanted = torch.stack([way[:, None].expand(-1, frames, -1, -1), time[:, None, None] * way[:, None]], 2)
            losses.append(((told - wanted) ** 2).mean((1, 2, 3, 4)))
        self.seen.clear()
        named = said.any(1).float()
        return (torch.stack(losses).mean(0) * named).sum() / named.sum().clamp(min=1)


def text_to_video_loss(
    unet,
    text_encoder,
    batch: dict[str, Tensor],
    empty: Tensor,
    generator: torch.Generator,
    share: float = 0.0,
    readers: WayReaders | None = None,
) -> Tensor:
    """EDM's loss under a caption. batch: latents [n, T, 4, h, w], mask [n, T, h, w], tokens [n, variants, length];
    empty: the tokens [length] of the empty caption. share: 0..1, of the training that is behind."""
    z, device = batch["latents"].float(), batch["latents"].device
    n = len(z)
    pick = torch.randint(batch["tokens"].shape[1], (n,), generator=generator).to(device)
    drop = torch.rand(n, generator=generator).to(device) < UNCONDITIONAL
    tokens = torch.where(drop[:, None], empty.to(device), batch["tokens"][torch.arange(n), pick].long())
    context = text_encoder(tokens).last_hidden_state
    added = torch.tensor(PLAIN_IDS, device=device).expand(n, -1)

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            model_input = torch.cat([x, torch.zeros_like(x)], 2)
            return unet(model_input, 0.25 * sigma.log(), context, added, return_dict=False)[0].float()

    mean = P_MEAN + (LAST_P_MEAN - P_MEAN) * share
    sigma = draw_sigmas(n, generator, mean, P_STD, WIDE).to(device)
    loss = edm_loss(network, z, sigma, batch["mask"].float(), generator, DRIFT_WEIGHT)
    return loss if readers is None else loss + WAY_WEIGHT * (1 - share) * readers.loss(tokens, z.shape[1])


def draw_clips(data: dict[str, Tensor], count: int, brief: int | None, generator: torch.Generator) -> dict[str, Tensor]:
    """A batch of `count` whole clips, or of as many frames in clips of their first `brief` frames."""
    frames = data["latents"].shape[1]
    kept = brief or frames
    index = torch.randint(len(data["latents"]), (count * frames // kept,), generator=generator)
    batch = {key: value[index] for key, value in data.items()}
    return batch | {key: batch[key][:, :kept] for key in ("latents", "mask")}


def teach_words(text_encoder, tokenizer, generator: torch.Generator, steps: int = 800, lr: float = 2e-3) -> float:
    """Teach a fresh text encoder what captions say, before a UNet learns from it; returns the last mean loss.

    Linear readers tell each of a caption's words from the mean over its tokens, which is what a cross-attention that
    has not learnt where to look passes on. They are dropped afterwards, and the encoder is not trained any more: with
    the UNet it made room for what the UNet learnt first, the colours, until the direction had a five-hundredth part of
    the context's variance.
    """
    width = text_encoder.config.hidden_size
    readers = torch.nn.ModuleDict({key: torch.nn.Linear(width, len(said)) for key, said in captions.OPTIONS.items()})
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *readers.parameters()], lr=lr)
    mean = 0.0
    for step in range(steps):
        words = captions.draw_words(64, generator, styled=0.5)
        said = [captions.draw_caption(words, index, generator) for index in range(len(words))]
        read = text_encoder(text.tokens(tokenizer, said)).last_hidden_state.mean(1)
        losses = [F.cross_entropy(reader(read), getattr(words, key)) for key, reader in readers.items()]
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        now = sum(loss.item() for loss in losses)
        mean = now if not step else 0.95 * mean + 0.05 * now
    return mean


def train_text_to_video(args, rank: int, device: torch.device) -> None:
    torch.manual_seed(args.seed)  # all workers start from the same weights
    unet, text_encoder, tokenizer = build_unet(), text.build_text_encoder(), text.load_tokenizer()
    path = args.folder / "text_to_video.pt"
    if args.start is not None:
        trained, _, reads, _ = text.load_text_components(args.start)
        unet.load_state_dict(trained.state_dict())
        text_encoder.load_state_dict(reads.state_dict())
    else:
        unet.load_state_dict(load_components()[0].state_dict())
    if args.start is None and not path.exists():
        loss = teach_words(text_encoder, tokenizer, torch.Generator().manual_seed(args.seed))
        log.info("the text encoder reads captions at a loss of %.2f", loss)
    readers = WayReaders(unet, tokenizer).to(device)
    text_encoder.requires_grad_(False)
    modules = {"unet": unet.to(device).train(), "text_encoder": text_encoder.to(device), "readers": readers}
    trainer = Trainer(modules, path, args.lr or 1e-3, args.minutes, rank, steps=args.steps)
    data, empty = load_cache(args.folder / "captioned"), text.tokens(tokenizer, [""])[0]
    network = torch.compile(unet, dynamic=False) if args.compile else unet
    generator = seeded(args, rank, trainer.step)
    while (share := trainer.progress()) < 1:
        brief = trainer.step % 2 == 1  # on all workers alike
        batch = draw_clips(data, args.batch, BRIEF if brief else None, generator)
        batch = {key: value.to(device) for key, value in batch.items()}
        taught = None if brief else readers
        trainer.update(text_to_video_loss(network, text_encoder, batch, empty, generator, share, taught), share)
    trainer.save()


def export(args, rank: int, device: torch.device) -> None:
    """Write the moving averages, in half precision and the checkpoint layout, to one safetensors file."""
    from safetensors.torch import save_file

    from .keys import text_to_checkpoint

    state = torch.load(args.folder / "text_to_video.pt", map_location="cpu")
    weights = text_to_checkpoint({name: state["ema"][name] for name in ("unet", "text_encoder")})
    save_file({key: value.half().contiguous() for key, value in weights.items()}, TEXT_WEIGHTS)
    log.info("%s: %.1f MB, %d steps", TEXT_WEIGHTS, TEXT_WEIGHTS.stat().st_size / 1e6, state["step"])
