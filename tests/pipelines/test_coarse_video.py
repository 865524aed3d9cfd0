"""The coarse video: its first frame is the picture, and its homographies are those of closed form."""

import math

import pytest
import torch

from rewind.pipelines.dreamix.coarse_video import FILLS, MOVES, View, between, coarse_video, homography, move

HEIGHT, WIDTH = 40, 64
CENTRE = ((WIDTH - 1) / 2, (HEIGHT - 1) / 2)


@pytest.fixture
def picture():
    y, x = torch.meshgrid(torch.linspace(0, 1, HEIGHT), torch.linspace(0, 1, WIDTH), indexing="ij")
    return torch.stack([0.1 + 0.5 * x, 0.1 + 0.5 * y, 0.3 + 0.2 * torch.sin(9 * x + 5 * y)])


def moved(view, x, y):
    point = homography(view, HEIGHT, WIDTH) @ torch.tensor([x, y, 1.0], dtype=torch.float64)
    return (point[:2] / point[2]).tolist()


FOCAL = WIDTH / (2 * math.tan(math.radians(25)))


@pytest.mark.parametrize("x", [0.0, 11.0, 63.0])
@pytest.mark.parametrize("y", [0.0, 30.0])
def test_homographies_are_those_of_closed_form(x, y):
    cx, cy = CENTRE
    assert moved(View(), x, y) == pytest.approx([x, y])
    assert moved(View(zoom=0.7), x, y) == pytest.approx([cx + 0.7 * (x - cx), cy + 0.7 * (y - cy)])
    assert moved(View(x=0.25, y=-0.5), x, y) == pytest.approx([x + 16, y - 20])
    assert moved(View(roll=90), x, y) == pytest.approx([cx - (y - cy), cy + (x - cx)])
    sin, cos = math.sin(math.radians(20)), math.cos(math.radians(20))
    depth = 1 + sin * (x - cx) / FOCAL
    assert moved(View(yaw=20), x, y) == pytest.approx([cx + cos * (x - cx) / depth, cy + (y - cy) / depth])
    depth = 1 - sin * (y - cy) / FOCAL
    assert moved(View(pitch=20), x, y) == pytest.approx([cx + (x - cx) / depth, cy + cos * (y - cy) / depth])


def test_a_turned_picture_is_smaller_where_it_is_farther():
    def side(view, x):
        return moved(view, x, HEIGHT - 1)[1] - moved(view, x, 0)[1]

    assert side(View(yaw=20), WIDTH - 1) < HEIGHT - 1 < side(View(yaw=20), 0)


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("fill", FILLS)
def test_the_first_frame_is_the_picture_and_the_others_move(picture, name, fill):
    video = coarse_video(picture, 6, move(name), fill=fill)
    assert video.shape == (6, 3, HEIGHT, WIDTH) and 0 <= video.min() and video.max() <= 1
    assert torch.equal(video[0], picture)
    if name == "replicate":
        assert torch.equal(video, picture.expand(6, -1, -1, -1))
    else:
        assert ((video[1:] - video[:-1]).abs().mean((1, 2, 3)) > 1e-3).all()


def test_the_pixels_go_where_the_homography_says(picture):
    panned = coarse_video(picture, 2, View(x=0.25), fill="white")[-1]
    assert torch.allclose(panned[:, :, 16:], picture[:, :, :-16], atol=1e-4)
    assert torch.allclose(panned[:, :, :15], torch.ones(3, HEIGHT, 15))
    upside_down = coarse_video(picture, 2, View(roll=180))[-1]
    assert torch.allclose(upside_down[:, 1:-1, 1:-1], picture.flip(1, 2)[:, 1:-1, 1:-1], atol=1e-3)


def test_what_lies_beyond_the_edge(picture):
    white, edge, reflect = (coarse_video(picture, 2, View(x=0.25), fill=fill)[-1] for fill in FILLS)
    assert torch.allclose(edge[:, :, :15], picture[:, :, :1].expand(-1, -1, 15), atol=1e-4)
    assert torch.allclose(reflect[:, :, :15], picture[:, :, 2:17].flip(2), atol=2e-2)
    assert white[:, :, :15].min() > 0.999


def test_a_zoom_out_leaves_the_papers_white_border(picture):
    last = coarse_video(picture, 16, move("zoom out"))[-1]
    assert (last[:, :4] == 1).all() and (last[:, :, :6] == 1).all()
    assert last[:, HEIGHT // 2, WIDTH // 2].mean() < 0.9


def test_the_easing_and_the_ways_between():
    views = [between(View(), View(zoom=0.25, yaw=40), share) for share in (0, 0.5, 1)]
    assert [view.zoom for view in views] == pytest.approx([1, 0.5, 0.25])
    assert [view.yaw for view in views] == [0, 20, 40]
    assert move("zoom out", 2).zoom == pytest.approx(0.49)
    assert move("pan left", 0.5) == View(x=0.125)
    ramp = torch.linspace(0, 1, 64).expand(3, 40, 64)
    for easing, expected in (("linear", [0, 4, 8, 12, 16]), ("smooth", [0, 2.5, 8, 13.5, 16])):
        video = coarse_video(ramp, 5, View(x=0.25), easing=easing, fill="edge")
        assert ((ramp[0, 0, 40] - video[:, 0, 0, 40]) * 63).tolist() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("frames", "end", "options", "words"),
    [
        (1, View(), {}, "at least 2"),
        (4, View(zoom=0), {}, "zoom"),
        (4, View(yaw=120), {}, "turn it less"),
        (4, View(), {"fill": "black"}, "white, edge, reflect"),
        (4, View(), {"easing": "bounce"}, "linear, smooth"),
    ],
)
def test_bad_settings_are_refused(picture, frames, end, options, words):
    with pytest.raises(ValueError, match=words):
        coarse_video(picture, frames, end, **options)


def test_bad_pictures_and_moves_are_refused(picture):
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        coarse_video(picture[:1], 4, View())
    with pytest.raises(ValueError, match="zoom out"):
        move("zoom sideways")
