"""The node that decodes a long clip a few frames at a time, without seams."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..pipelines.chunks import CHUNK, OVERLAP, spans
from ..pipelines.evaluation.memory import in_words
from .host import costs
from .host.encoding import decode_clip, frame_bytes, frames_that_fit, is_video_vae, sees_clips
from .host.schema import Schema
from .preparation import CATEGORY


class ChunkedDecode(io.ComfyNode):
    """A clip's latents as frames, in chunks that overlap."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindChunkedDecode",
            display_name="VAE Decode in Chunks",
            category=CATEGORY,
            description="Decodes a long clip a few frames at a time, in chunks that go over into each other, for VAEs "
            "that take what they decode at once for one clip (Stable Video Diffusion). VAE Decode cuts such a clip by "
            "the memory that is free, which shows as a seam, and VAE Decode (Tiled) decodes every frame alone. Says "
            "before it starts how much memory a chunk takes.",
            search_aliases=["chunked decode", "decode chunk size", "VAE decode out of memory", "temporal VAE"],
            inputs=[
                io.Latent.Input("samples", tooltip="The clip's latent, one a frame."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the MODEL."),
                io.Int.Input(
                    "frames_at_once",
                    default=CHUNK,
                    min=1,
                    max=4096,
                    tooltip="The most frames that are decoded together. Lower it where memory runs out: half as many "
                    "take half as much. Higher is steadier over time and faster; 14 is what Stable Video Diffusion was "
                    "trained on. Where ComfyUI reckons that they do not fit, fewer are taken, and that is told.",
                ),
                io.Int.Input(
                    "overlap",
                    default=OVERLAP,
                    min=0,
                    max=64,
                    tooltip="Frames that two chunks share and go over in, at most half of a chunk. Higher hides a seam "
                    "better and decodes that many frames twice; 0 cuts, as other nodes do. The default was enough on "
                    "every clip tried.",
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="The clip's frames.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any, frames_at_once: int, overlap: int) -> io.NodeOutput:
        latents = samples["samples"]
        if is_video_vae(vae) or latents.ndim != 4:
            raise ValueError(
                f"this VAE, or the latent of shape {tuple(latents.shape)}, is not of a model whose frames are a batch "
                "(Stable Video Diffusion): VAE Decode (Tiled) decodes it in overlapping chunks, by its temporal_size"
            )
        wanted = min(frames_at_once, len(latents))
        chunk = frames_that_fit(vae, latents, wanted)
        overlap = min(overlap, chunk // 2) if sees_clips(vae) else 0
        parts = spans(len(latents), chunk, overlap)
        most, size = max(end - start for start, end in parts), frame_bytes(vae, latents)
        chunks = (
            f" in {len(parts)} chunks of at most {most}, neighbours share {overlap}" if len(parts) > 1 else " at once"
        )
        text = f"{len(latents)} frames{chunks}; about {in_words(most * size)} on {vae.device} (as ComfyUI reckons)"
        if chunk < wanted:
            text += f"; {wanted} at once would take {in_words(wanted * size)}, more than can be had"
        costs.tell(cls.hidden.unique_id, "VAE Decode in Chunks", text)
        return io.NodeOutput(decode_clip(vae, latents, chunk, overlap))
