"""Clips and pictures survive the disk, and come in as a player shows them."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from rewind.demo import world as W
from rewind.pipelines.evaluation.metrics import psnr
from rewind.pipelines.video import (
    contact_sheet,
    fit,
    nearest_size,
    read_image,
    read_video,
    write_image,
    write_video,
)


@pytest.fixture(scope="module")
def clip():
    scene = W.sample(1, torch.Generator().manual_seed(0), W.World(frames=6), editable=True)
    return W.render(scene)[0][0]


def write_counted(path, count: int, fps, size=(64, 48), audio: bool = False) -> None:
    """A file whose frame number i is all of grey level 8 * i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt, stream.options = *size, "yuv420p", {"crf": "0"}
        sound = container.add_stream("aac", rate=44100, layout="mono") if audio else None
        for i in range(count):
            picture = np.full((size[1], size[0], 3), 8 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 0
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))


def numbers(frames: torch.Tensor) -> list[int]:
    """Which frames of a counted file these are."""
    return [round(float(f.mean()) * 255 / 8) for f in frames]


@pytest.mark.parametrize(("ticks", "uneven"), [([0, 1, 2, 3, 4, 5], False), ([0, 1, 2, 6, 7, 8], True)])
def test_a_varying_frame_rate_is_seen(tmp_path, ticks, uneven):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for tick in ticks:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * tick, np.uint8), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    read = read_video(tmp_path / "a.mp4")
    assert (numbers(read.frames), read.uneven) == (ticks, uneven)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(clip, tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", clip, 7)
    before = (tmp_path / "a.mp4").read_bytes()

    def broken(*_, **__):
        raise ValueError("the encoder broke")

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", broken)
    with pytest.raises(ValueError, match="broke"):
        write_video(tmp_path / "a.mp4", clip, 7)
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(("chroma", "decibels"), [("444", 45.0), ("420", 30.0)])
def test_a_clip_survives_the_disk(clip, tmp_path, chroma, decibels):
    write_video(tmp_path / "a.mp4", clip, Fraction(30000, 1001), chroma=chroma, crf=4)
    back = read_video(tmp_path / "a.mp4")
    assert back.frames.shape == clip.shape
    assert back.fps == back.file_fps == Fraction(30000, 1001)
    assert not back.has_audio and not back.trimmed
    assert psnr(back.frames, clip) > decibels


def test_equal_frames_make_equal_files(tmp_path):
    """Small ones too, and whatever the memory held that the encoder gets: clips are read and written in between."""
    made = {}
    for _ in range(60):
        for side in (48, 32):
            generator = torch.Generator().manual_seed(0)
            still = torch.rand(1, 3, side // 8, side // 8, generator=generator)
            still = torch.nn.functional.interpolate(still, size=(side, side), mode="bicubic").clamp(0, 1)
            moving = (
                still
                + 0.02 * torch.arange(4)[:, None, None, None]
                + 0.01 * torch.rand(4, 3, side, side, generator=generator)
            )
            write_video(tmp_path / "clip.mp4", moving, 12)
            made.setdefault(side, set()).add((tmp_path / "clip.mp4").read_bytes())
            read_video(tmp_path / "clip.mp4")
    assert [len(files) for files in made.values()] == [1, 1]


def test_values_outside_the_range_are_clamped(tmp_path):
    write_video(tmp_path / "a.mp4", torch.full((2, 3, 32, 32), 1.7), 7)
    assert read_video(tmp_path / "a.mp4").frames.min() > 0.99


def test_the_file_says_its_colour_space(clip, tmp_path):
    write_video(tmp_path / "a.mp4", clip, 7)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)


@pytest.mark.parametrize("fps", [10, 24, Fraction(30000, 1001), 60])
def test_all_frames_of_any_rate_come_in(tmp_path, fps):
    write_counted(tmp_path / "a.mp4", 12, fps)
    read = read_video(tmp_path / "a.mp4")
    assert numbers(read.frames) == list(range(12))
    assert read.fps == Fraction(fps)


def test_reading_stops_at_the_number_of_frames(tmp_path):
    write_counted(tmp_path / "a.mp4", 12, 24)
    first = read_video(tmp_path / "a.mp4", frames=5)
    assert numbers(first.frames) == [0, 1, 2, 3, 4]
    assert first.trimmed
    assert not read_video(tmp_path / "a.mp4", frames=12).trimmed


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [(10, [0, 2, 4, 6, 8, 10]), (8, [0, 2, 5, 7, 10]), (40, [i // 2 for i in range(24)])],
)
def test_resampling_takes_what_a_player_shows(tmp_path, wanted, expected):
    write_counted(tmp_path / "a.mp4", 12, 20)
    read = read_video(tmp_path / "a.mp4", fps=wanted)
    assert numbers(read.frames) == expected
    assert (read.fps, read.file_fps) == (wanted, 20)


def test_resampling_and_trimming_together(tmp_path):
    write_counted(tmp_path / "a.mp4", 12, 20)
    read = read_video(tmp_path / "a.mp4", frames=3, fps=10)
    assert numbers(read.frames) == [0, 2, 4]
    assert read.trimmed


def test_an_audio_track_is_told_and_left_out(tmp_path):
    write_counted(tmp_path / "a.mp4", 4, 10, audio=True)
    read = read_video(tmp_path / "a.mp4")
    assert read.has_audio
    assert len(read.frames) == 4


def test_a_rotated_clip_comes_in_upright(tmp_path):
    """The display matrix of a phone held upright: a quarter turn clockwise."""
    frames = torch.zeros(2, 3, 32, 64)
    frames[:, 0, :, :32] = 1  # red on the left: after the turn on top
    write_video(tmp_path / "a.mp4", frames, 7, crf=0)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    one, w = 0x10000, 0x40000000
    turned = [0, one, 0, -one, 0, 0, 32 * one, 0, w]
    data[matrix : matrix + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in turned)
    (tmp_path / "b.mp4").write_bytes(data)
    read = read_video(tmp_path / "b.mp4").frames
    assert read.shape == (2, 3, 64, 32)
    assert read[0, 0, :28].mean() > 0.95 and read[0, 0, 36:].mean() < 0.05


def test_pixels_come_in_square(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 48, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    assert read_video(tmp_path / "a.mp4").frames.shape[2:] == (48, 64)


def test_what_is_not_a_video_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        read_video(tmp_path / "absent.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match="does not decode"):
        read_video(tmp_path / "text.mp4")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
    with pytest.raises(ValueError, match="no video"):
        read_video(tmp_path / "sound.wav")


@pytest.mark.parametrize(
    ("frames", "options", "words"),
    [
        (torch.zeros(2, 1, 32, 32), {}, r"\[T, 3, H, W\]"),
        (torch.zeros(0, 3, 32, 32), {}, r"\[T, 3, H, W\]"),
        (torch.zeros(2, 3, 33, 32), {}, "even sides"),
        (torch.zeros(2, 3, 32, 32), {"chroma": "422"}, "chroma"),
    ],
)
def test_bad_frames_are_refused(tmp_path, frames, options, words):
    with pytest.raises(ValueError, match=words):
        write_video(tmp_path / "a.mp4", frames, 7, **options)


def test_a_picture_survives_the_disk(clip, tmp_path):
    write_image(tmp_path / "a.png", clip[0])
    assert (read_image(tmp_path / "a.png") - clip[0]).abs().max() <= 0.5 / 255 + 1e-6


def test_pictures_of_every_mode_come_in_as_rgb(tmp_path):
    Image.new("L", (4, 2), 51).save(tmp_path / "grey.png")
    Image.new("P", (4, 2), 0).save(tmp_path / "palette.png")
    Image.fromarray(np.full((2, 4), 13107, np.uint16)).save(tmp_path / "grey16.png")
    half = Image.new("RGBA", (4, 2), (255, 0, 0, 51))
    half.save(tmp_path / "transparent.png")
    expected = {"grey": [0.2] * 3, "palette": [0.0] * 3, "grey16": [0.2] * 3, "transparent": [0.2, 0, 0]}
    for name, colour in expected.items():
        picture = read_image(tmp_path / f"{name}.png")
        torch.testing.assert_close(picture, torch.tensor(colour)[:, None, None].expand(3, 2, 4), atol=1e-3, rtol=0)


def test_a_photograph_comes_in_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to view
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (3, 8, 4)


def test_what_is_not_a_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match="picture"):
        read_image(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_image(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("size", "area", "multiple", "expected"),
    [
        ((1920, 1080), 1024 * 576, 64, (1024, 576)),
        ((1080, 1920), 1024 * 576, 64, (576, 1024)),
        ((640, 640), 1024 * 576, 64, (768, 768)),
        ((500, 500), 96 * 96, 32, (96, 96)),
        ((4, 3), 96 * 96, 8, (104, 80)),
    ],
)
def test_the_size_keeps_the_proportions_as_near_as_it_can(size, area, multiple, expected):
    assert nearest_size(*size, area, multiple) == expected


@pytest.mark.parametrize("size", [(1920, 1080), (480, 640), (97, 301), (3000, 100)])
def test_every_size_is_brought_to_one_that_the_model_takes(size):
    width, height = nearest_size(*size, 96 * 96, 32)
    assert width % 32 == 0 and height % 32 == 0
    assert 0.5 <= width * height / 96**2 <= 2


def test_fit_crops_evenly_and_keeps_the_proportions():
    column = torch.linspace(0, 1, 60).expand(1, 3, 40, 60)
    cropped = fit(column, 40, 40)
    assert cropped.shape == (1, 3, 40, 40)
    torch.testing.assert_close(cropped, column[..., 10:50])
    half = fit(column, 30, 20)
    torch.testing.assert_close(half[0, 0, 0], column[0, 0, 0].unflatten(0, (30, 2)).mean(1), atol=5e-3, rtol=0)


def test_a_sheet_shows_each_pixel_enlarged(clip):
    sheet = contact_sheet({"source": clip, "result": 1 - clip}, scale=2, gap=4)
    assert sheet.shape == (3, 4 + 2 * (18 + 8 + 192 + 4), 4 + 6 * (192 + 4))
    shown = sheet[:, 4 + 26 : 4 + 26 + 192, 4 : 4 + 192]
    torch.testing.assert_close(shown[:, ::2, ::2], (clip[0] * 255).round() / 255)
    torch.testing.assert_close(shown[:, 1::2, 1::2], shown[:, ::2, ::2])
    assert sheet[:, 4:22, :60].min() < 0.5, "the label is missing"
    with pytest.raises(ValueError, match="one shape"):
        contact_sheet({"a": clip, "b": clip[:2]})
