"""The nodes that look at an inversion: how well it comes back, and how it went."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..pipelines.denoiser import V
from ..pipelines.evaluation.memory import in_words
from ..pipelines.evaluation.metrics import psnr
from ..pipelines.videoshop.diagnostics import frame_errors, inverted_noise, noise_statistics, step_cosines
from ..pipelines.videoshop.inversion import Inversion
from ..pipelines.videoshop.parts import Part, parts_of
from . import figures
from .host import checks, costs, parts, sampling
from .host.encoding import decode_clip, frame_bytes, frames_that_fit, is_video_vae, sees_clips
from .host.schema import InversionType, Schema
from .preparation import CATEGORY, resized


def decoded(vae: Any, samples: Tensor) -> Tensor:
    """A latent clip as frames [T, H, W, 3], as the host's VAE Decode gives them, without seams where they do not fit
    into memory at once."""
    if sees_clips(vae):
        chunk = frames_that_fit(vae, samples, len(samples))
        return decode_clip(vae, samples, chunk)[..., :3]
    images = vae.decode(samples)
    return images.reshape(-1, *images.shape[-3:])[..., :3]


def decoding_in_words(vae: Any, samples: Tensor) -> str:
    """ "; 496 MiB to decode", the most that `decoded` takes."""
    frames = 1 if is_video_vae(vae) else len(samples)  # of a video VAE the clip is what it reckons for
    told = f"two clips, one after the other, on {vae.device}; fewer frames at once where less is free"
    return f"; {in_words(frames * frame_bytes(vae, samples))} to decode ({told})"


def frame_psnrs(a: Tensor, b: Tensor) -> list[float]:
    """PSNR of each frame of two clips [T, H, W, 3], dB."""
    a, b = a.movedim(-1, 1), b.movedim(-1, 1)
    return [psnr(a[i : i + 1], b[i : i + 1]) for i in range(len(a))]


def clip_psnr(a: Tensor, b: Tensor) -> float:
    """PSNR of two clips [T, H, W, 3], dB."""
    return psnr(a.movedim(-1, 1), b.movedim(-1, 1))


class RoundTripCheck(io.ComfyNode):
    """How well a clip comes back when nothing is edited."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindRoundTripCheck",
            display_name="Round-Trip Check",
            category=CATEGORY,
            description="Plays an inverted clip again WITHOUT an edit and measures what was lost: by the VAE, which "
            "no inversion can win back, and by the inversion. Where the inversion's figure is well above the VAE's, "
            "the inversion is not what limits the result.",
            search_aliases=["reconstruction", "PSNR", "inversion error"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that made the inversion."),
                io.Conditioning.Input(
                    "positive", tooltip="The conditioning of the inversion: for SVD source_positive."
                ),
                InversionType.Input(
                    "inversion", tooltip="The inversion to check. It is played again, which costs its steps."
                ),
                io.Vae.Input("vae", tooltip="The VAE that encoded the clip."),
                io.Image.Input("clip", tooltip="The source clip, to compare with."),
            ],
            outputs=[
                io.String.Output("report", tooltip="All figures as text, frame by frame."),
                io.Image.Output(
                    "picture", tooltip="The source, the VAE's copy and the clip that came back, with PSNR."
                ),
                io.Float.Output("psnr", tooltip="The clip that came back against the source, dB. Higher is better."),
                io.Float.Output(
                    "psnr_vae", tooltip="The VAE's copy against the source, dB: the most that is possible."
                ),
                io.Float.Output("psnr_inversion", tooltip="The clip that came back against the VAE's copy, dB."),
                io.Float.Output("latent_error", tooltip="Relative error of the latent that came back; 0 is perfect."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, positive: list, inversion: Inversion, vae: Any, clip: Tensor) -> io.NodeOutput:
        samples = sampling.state_of(model, inversion)
        checks.check_conditioning(model, positive, samples, "positive")
        if inversion.source is None:
            raise ValueError(
                "this inversion does not hold its source: make it with EDM Inversion with Noise Extrapolation"
            )
        if (cfg := inversion.settings.get("cfg", 1.0)) != 1.0:
            raise ValueError(
                f"this inversion was made with cfg {cfg:g}, and the check plays it again without guidance: it would "
                "blame the inversion for the difference; invert with cfg 1"
            )
        source, guider = model.model.process_latent_out(inversion.source), sampling.guider(model, positive)
        told = {"more": decoding_in_words(vae, source), "found": parts_of(inversion)}
        costs.tell_way_back(cls.hidden.unique_id, "Round-Trip Check", guider, samples, inversion.sigmas, **told)
        copy = decoded(vae, source)
        frames = resized(clip, copy.shape[2], copy.shape[1], "clip").to(copy.device)
        if len(frames) != len(copy):
            raise ValueError(
                f"the clip has {len(frames)} frames, the inversion {len(copy)}: connect the clip that was inverted"
            )

        def make_guider(told: list, part: Part) -> Any:
            return sampling.guider(model, told)

        result = parts.play(model, inversion, positive, make_guider, following=source)
        errors = frame_errors(result.cpu(), source.cpu())
        return cls._report(frames.float(), copy.float(), decoded(vae, result).float(), errors, inversion)

    @staticmethod
    def _report(frames: Tensor, copy: Tensor, back: Tensor, errors: Tensor, inversion: Inversion) -> io.NodeOutput:
        whole, vae_share, own_share = clip_psnr(back, frames), clip_psnr(copy, frames), clip_psnr(back, copy)
        by_frame = frame_psnrs(back, frames), frame_psnrs(copy, frames), frame_psnrs(back, copy)
        error = float(errors.square().mean().sqrt())
        lines = [
            f"round trip {whole:.2f} dB, the VAE alone {vae_share:.2f} dB, the inversion alone {own_share:.2f} dB",
            f"relative error of the latent {error:.2e}, {inversion.evaluations} network evaluations in the inversion",
        ]
        if inversion.residuals:
            lines.append(f"largest residual of a step {max(inversion.residuals):.1e}")
        for i, values in enumerate(zip(*by_frame)):
            lines.append(f"frame {i + 1}: {values[0]:.2f} dB, VAE {values[1]:.2f} dB, inversion {values[2]:.2f} dB")
        lines += [f"latent frame {i + 1}: relative error {float(e):.2e}" for i, e in enumerate(errors)]
        captions = [[f"{value:.1f} dB" for value in values] for values in by_frame]
        picture = figures.contact_sheet(
            [
                ("source", frames, [f"frame {i + 1}" for i in range(len(frames))]),
                ("VAE alone (PSNR to the source)", copy, captions[1]),
                ("there and back (PSNR to the source)", back, captions[0]),
                ("difference by the inversion x 10 (PSNR to the VAE's)", (0.5 + 10 * (back - copy)), captions[2]),
            ]
        )
        return io.NodeOutput("\n".join(lines), figures.to_tensor(picture), whole, vae_share, own_share, error)


class TrajectoryPlot(io.ComfyNode):
    """How an inversion went, as a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindTrajectoryPlot",
            display_name="Trajectory Plot",
            category=CATEGORY,
            description="Draws how an inversion went: how alike its steps' directions are (red is alike: what noise "
            "extrapolation rests on), and how much the noise it found is like fresh noise, frame by frame: a spread "
            "near 1 and no correlation with the clip edit best.",
            search_aliases=["inversion plot", "cosine similarity", "noise statistics"],
            inputs=[InversionType.Input("inversion", tooltip="The inversion to draw.")],
            outputs=[
                io.Image.Output(
                    "plot", tooltip="Three drawings: all pairs of steps, neighbouring steps, noise by frame."
                ),
                io.Float.Output(
                    "mean_cosine", tooltip="Mean cosine similarity of neighbouring steps; 1 is a straight path."
                ),
                io.Float.Output("noise_std", tooltip="Standard deviation of the noise found; 1 in fresh noise."),
            ],
        )

    @classmethod
    def execute(cls, inversion: Inversion) -> io.NodeOutput:
        if inversion.trajectory is None:
            raise ValueError("this inversion holds no trajectory: make it with EDM Inversion with Noise Extrapolation")
        path = inversion.settings.get("path", V)
        sigma = inversion.sigmas[:1].double()
        clean = inversion.trajectory[0]
        noise = inverted_noise(inversion.latent, clean, float(sigma), float(path.signal(sigma)))
        deviation, correlation = noise_statistics(noise, clean)
        cosines = step_cosines(inversion.trajectory)
        neighbours = cosines.diagonal(1) if len(cosines) > 1 else cosines.diagonal()
        plot = figures.side_by_side(
            [
                figures.matrix("step directions, all pairs", "step, from clean to noise", cosines),
                figures.curves("cosine of neighbouring steps", "step", [("cosine", neighbours)]),
                figures.curves("the noise found", "frame", [("std", deviation), ("correlation", correlation)]),
            ]
        )
        return io.NodeOutput(figures.to_tensor(plot), float(neighbours.mean()), float(noise.double().std()))
