"""The pictures of the help pages of masks: one edit of the embedded clip, with and without what keeps it local."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

from help_studio import Studio

BRIGHTER = 4  # differences are shown so many times as large


class MaskedEdit:
    """The mask of the studio's edit, and the edit under it; each is made once."""

    def __init__(self, studio: Studio):
        self.studio, self.run = studio, studio.run

    def mask(self, **settings: Any) -> Any:
        clip = {"clip": self.studio.clip, "edited_frame": self.studio.edited_frame}
        return self.run("RewindEditMask", **clip, **settings)[0]

    @cached_property
    def hard(self) -> Any:
        return self.mask()

    @cached_property
    def sampled(self) -> dict:
        """The way back through the host's sampler, under the mask."""
        studio = self.studio
        latent, sigmas, _, inversion = studio.inverted
        guider = self.run("BasicGuider", model=studio.model, conditioning=studio.prepared[2])[0]
        sampler = self.run("RewindMaskedSampler", inversion=inversion, mask=self.hard)[0]
        none = self.run("DisableNoise")[0]
        return self.run(
            "SamplerCustomAdvanced", noise=none, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
        )[0]

    @cached_property
    def masked(self) -> Any:
        """The frames of SVD Denoise under the mask."""
        return self.studio.decode(self.studio.denoised(mask=self.hard))

    def differs(self, frames: Any) -> tuple[str, Any]:
        """A row that shows where frames are not the source's."""
        difference = (BRIGHTER * (frames - self.studio.clip).abs()).clamp(0, 1)
        return f"how it differs from the source, {BRIGHTER} times as bright", difference


edit = cache(MaskedEdit)


def grey(mask: Any) -> Any:
    return mask[..., None].expand(-1, -1, -1, 3)


def edit_mask(studio: Studio) -> Any:
    made = edit(studio)
    return studio.sheet(
        ("clip", studio.clip),
        ("its true edit", studio.truth),
        ("mask: grow 4, feather 0", grey(made.hard)),
        ("mask: grow 8, feather 12", grey(made.mask(grow=8, feather=12))),
    )


def masked_sampler(studio: Studio) -> Any:
    return studio.sheet(
        ("the source", studio.clip),
        ("the edit without a mask", studio.decode(studio.result)),
        ("the edit under the mask", studio.decode(edit(studio).sampled)),
        ("the mask", grey(edit(studio).hard)),
    )


def source_composite(studio: Studio) -> Any:
    made = edit(studio)
    both = made.run("RewindSourceComposite", latent=studio.result, source=studio.prepared[4], mask=made.hard)[0]
    frames = studio.decode(both)
    return studio.sheet(
        ("the source", studio.clip),
        ("the edit without a mask", studio.decode(studio.result)),
        ("both in one, decoded", frames),
        made.differs(frames),
    )


def pixel_composite(studio: Studio) -> Any:
    made = edit(studio)
    inputs = {"images": made.masked, "clip": studio.clip, "mask": made.hard}
    plain, matched = (made.run("RewindPixelComposite", match=match, **inputs)[0] for match in (False, True))
    return studio.sheet(
        ("the edit under a mask, decoded", made.masked),
        ("composited without match", plain),
        ("composited with match", matched),
        made.differs(matched),
    )


PICTURES: dict[str, Callable[[Studio], Any]] = {
    "RewindEditMask.jpg": edit_mask,
    "RewindMaskedSampler.jpg": masked_sampler,
    "RewindSourceComposite.jpg": source_composite,
    "RewindPixelComposite.jpg": pixel_composite,
}
