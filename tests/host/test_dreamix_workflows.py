"""Dreamix's graphs run as they are, through the server, and show the known answer; Wan's has the same wiring."""

from __future__ import annotations

import json

import comfy_host
import graph
import pytest
import torch
from graph import flatten, link_ends, to_api
from results import frames, node_of
from safetensors.torch import load_file
from shipped import LONGEST, Runs, behind_loaders, inner_settings, note, read, refusals, settings, tunes

BLUEPRINT = comfy_host.ROOT / "subgraphs" / "Dreamix Edit.json"
RESULTS = {  # the title of the result's preview, and the side of its frames
    "dreamix_edit": ("Edited clip", 144),
    "dreamix_animate_image": ("Animated picture", 144),
    "dreamix_subject": ("New clip", 96),
}
CORRUPTIONS = ("RewindDreamixCorrupt", "Second pass: corrupt")  # titles
STEPS_AS_SHIPPED = range(20, 61)  # of the fine-tuning, to stay below that
LOADERS = {"RewindDemoTextToVideo", "RewindDemoTextEdit", "UNETLoader", "CLIPLoader", "VAELoader", "ModelSamplingSD3"}
# What only the demo has: the prompt of its clip, and the true edit of it.
OF_THE_DEMO = {("RewindDreamixPrompt ", "prompt"), ("PreviewImage True edit", "images")}
FINE_TUNE_STEPS = ("RewindDreamixFineTune", "", "steps")


@pytest.fixture(scope="module")
def run(host, server, trained):
    """A function: a graph run as it was saved, once (`shipped.Ran`)."""
    runs = Runs(server)

    def once(name: str) -> tuple:
        if not tunes(host):
            pytest.skip("this ComfyUI cannot copy a model to tune: what it says of that is tested")
        return runs(name, RESULTS[name][0])

    return once


# --- as saved --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESULTS)
def test_it_runs_in_time(run, server, name):
    prompt, history, result, seconds = run(name)
    side = RESULTS[name][1]
    assert result.shape == (8, side, side, 3)
    assert float(result.std()) > 0.01
    assert seconds <= LONGEST
    steps = prompt[node_of(prompt, "RewindDreamixFineTune")]["inputs"]["steps"]
    assert steps in STEPS_AS_SHIPPED
    prefix = prompt[node_of(prompt, "SaveLoRA")]["inputs"]["prefix"]
    saved = list((server.base / "output").glob(f"{prefix}_{steps}_steps_*.safetensors"))
    assert saved and all(file.stat().st_size for file in saved)
    lora = load_file(saved[0])
    assert lora and all(torch.isfinite(value).all() for value in lora.values())
    (picture,) = history["outputs"][node_of(prompt, "RewindDreamixFineTune")]["images"]
    assert picture["filename"].endswith(".png")


@pytest.mark.parametrize("name", RESULTS)
def test_the_note_says_that_it_trains_less_than_a_run_that_counts(name):
    (tuning,) = [node for node in flatten(read(name))["nodes"] if node["type"] == "RewindDreamixFineTune"]
    steps = tuning.get("promoted", {}).get("steps", tuning["widgets_values"][1])
    assert f"trains for {steps} steps" in note(name) and "**A run that counts** takes 100" in note(name)


def test_what_it_learns_is_that_of_a_preset(host, server):
    """dreamix_edit spells out the preset of its kind of edit; the others take theirs from the node."""
    prompt = to_api(read("dreamix_edit"), server.object_info())
    clip = prompt[node_of(prompt, "RewindDemoTextEdit")]["inputs"]
    preset = host.module("pipelines.dreamix.presets").PRESETS[clip["edit"]]
    first, second = (prompt[node_of(prompt, "RewindDreamixCorrupt", title)]["inputs"] for title in CORRUPTIONS)
    assert {name: first[name] for name in ("s", "factor", "stride")} == {
        "s": preset.s,
        "factor": preset.factor,
        "stride": preset.stride,
    }
    assert (second["s"], second["factor"], second["stride"]) == (preset.second_pass, 1.0, 1)
    assert prompt[node_of(prompt, "RewindDreamixFineTune")]["inputs"]["alpha"] == preset.alpha


@pytest.mark.parametrize("name", RESULTS)
def test_without_fine_tuning_it_runs_on_every_host(host, server, trained, name):
    """0 steps hand the model on, and what would draw the losses is left out."""
    prompt = to_api(read(name), server.object_info())
    prompt[node_of(prompt, "RewindDreamixFineTune")]["inputs"]["steps"] = 0
    for title in CORRUPTIONS if name != "dreamix_subject" else CORRUPTIONS[:1]:
        prompt[node_of(prompt, "RewindDreamixCorrupt", title)]["inputs"]["steps"] = 4
    history = server.prompt(prompt)
    assert frames(server, history, node_of(prompt, "PreviewImage", RESULTS[name][0])).shape[0] == 8
    drawn = {prompt[number]["class_type"] for number in history["outputs"]}
    assert "LossGraphNode" not in drawn


def test_a_host_that_cannot_tune_says_so(host, server, trained):
    if tunes(host):
        pytest.skip("this ComfyUI can copy a model")
    with pytest.raises(RuntimeError, match="needs a ComfyUI that can copy a model .*update ComfyUI"):
        server.prompt(to_api(read("dreamix_edit"), server.object_info()))


def test_of_a_subject_nothing_is_passed_in(run, server):
    """Another picture behind Dreamix Corrupt changes nothing, another prompt does."""
    prompt, _, result, _ = run("dreamix_subject")
    shown, other = node_of(prompt, "PreviewImage"), json.loads(json.dumps(prompt))
    other[node_of(other, "ImageFromBatch", "Size of the new clip")]["inputs"]["batch_index"] = 3
    assert torch.equal(frames(server, server.prompt(other), shown), result)
    other[node_of(other, "RewindDreamixPrompt")]["inputs"]["prompt"] = "a shape moves up slowly"
    assert not torch.equal(frames(server, server.prompt(other), shown), result)


# --- the known answer ------------------------------------------------------------------------------------------------


@pytest.fixture
def result(trained, run):
    """A function: (prompt, the result [T, 3, H, W]) of a graph on the trained weights."""
    if not trained:
        pytest.skip("the embedded models' weights are not all there: with random ones the frames mean nothing")

    def of(name: str) -> tuple:
        prompt, _, pictures, _ = run(name)
        return prompt, pictures.movedim(-1, 1)

    return of


def test_the_edit_shows_the_known_answer(host, result):
    prompt, edited = result("dreamix_edit")
    edits, clip = host.module("demo.text_edits"), prompt[node_of(prompt, "RewindDemoTextEdit")]["inputs"]
    chosen = edits.text_example(clip["seed"], clip["edit"])
    assert not edits.score(chosen, chosen.source).success
    scores = edits.score(chosen, edited)
    assert scores.success, scores


def test_the_animated_picture_shows_the_known_answer(host, result):
    """The picture's shape, colour and background, moving as the prompt says."""
    prompt, animated = result("dreamix_animate_image")
    edits, seed = host.module("demo.text_edits"), prompt[node_of(prompt, "RewindDemoTextEdit")]["inputs"]["seed"]
    wanted = prompt[node_of(prompt, "RewindDreamixPrompt")]["inputs"]["prompt"]
    examples = [edits.text_example(seed, "motion", variant) for variant in range(edits.VARIANTS["motion"])]
    (chosen,) = [example for example in examples if example.prompt("") == wanted]
    scores = edits.score(chosen, animated)
    assert scores.success, scores


def test_the_new_clip_shows_the_subject_as_the_prompt_says(host, result):
    """Shape and colour of the pictures; motion and background of the prompt."""
    prompt, made = result("dreamix_subject")
    captions, seed = host.module("demo.captions"), prompt[node_of(prompt, "RewindDemoTextEdit")]["inputs"]["seed"]
    words = host.module("demo.text_edits").text_example(seed).source_words
    seen = host.module("demo.recognition").recognise(made)
    assert seen.present
    assert (seen.colour, seen.shape) == (int(words.colour), int(words.shape))
    asked = prompt[node_of(prompt, "RewindDreamixPrompt")]["inputs"]["prompt"].split()
    told = captions.DIRECTIONS[seen.direction], captions.SPEEDS[seen.quick], captions.HUES[seen.hue]
    assert [word for word in told if word not in asked] == []
    assert captions.HUES[int(words.hue)] not in asked, "the background is asked for anew"


# --- one wiring ------------------------------------------------------------------------------------------------------


@pytest.fixture
def wiring(monkeypatch):
    """link_ends, with the loaders of text-to-video models as what they are."""
    monkeypatch.setattr(graph, "LOADERS", graph.LOADERS | LOADERS)
    return link_ends


def test_the_graph_for_wan_has_the_same_wiring(wiring):
    own, wan = wiring(read("dreamix_edit")), wiring(read("dreamix_edit_wan"))
    assert own.keys() >= OF_THE_DEMO
    kept = {end: start for end, start in behind_loaders(wan).items() if end[0] != "a loader"}
    assert kept == {end: start for end, start in own.items() if end not in OF_THE_DEMO}


@pytest.mark.parametrize(
    "name, may_differ",
    [
        ("dreamix_edit_wan", {"prompt", "cfg", "learning_rate", "gradient_checkpointing"}),
        ("dreamix_animate_image", {"prompt", "alpha", "s", "factor", "stride"}),
    ],
)
def test_its_settings_are_those_of_the_parts(server, name, may_differ):
    """Those inside, which the page shows when the subgraph is opened, and those on the node."""
    info, own = server.object_info(), read("dreamix_edit")
    parts = settings(own["nodes"], own["links"], info)
    for found, allowed in zip(inner_settings(read(name), info), (may_differ, {"prompt"})):
        assert {kind for kind, _, _ in found} >= {"RewindDreamixPrompt", "RewindDreamixFineTune", "CFGGuider"}
        differ = {key for key, value in found.items() if parts.get(key, "") != value}
        assert {key[2] for key in differ - {FINE_TUNE_STEPS}} <= allowed


def test_the_settings_on_the_node_reach_their_parts(server):
    workflow = read("dreamix_edit_wan")
    (node,) = [node for node in workflow["nodes"] if node.get("title") == BLUEPRINT.stem]
    node["widgets_values"] = ["a cat", "zwx", 0.25, 11, 0.01, 0.6, 2.0, 3, 0.4, 2.0, 13, 5.0, 77, False]
    prompt = to_api(workflow, server.object_info())

    def inputs(kind: str, title: str | None = None) -> dict:
        return prompt[node_of(prompt, kind, title)]["inputs"]

    words, tuning = inputs("RewindDreamixPrompt"), inputs("RewindDreamixFineTune")
    assert (words["prompt"], words["token"]) == ("a cat", "zwx")
    assert (tuning["alpha"], tuning["steps"], tuning["learning_rate"], tuning["seed"]) == (0.25, 11, 0.01, 77)
    assert tuning["gradient_checkpointing"] is False
    first, second = (inputs("RewindDreamixCorrupt", title) for title in CORRUPTIONS)
    assert (first["s"], first["factor"], first["stride"], first["steps"]) == (0.6, 2.0, 3, 13)
    assert (second["s"], second["factor"], second["stride"], second["steps"]) == (0.4, 1.0, 1, 13)
    assert (inputs("ImageScaleBy")["scale_by"], inputs("CFGGuider")["cfg"]) == (2.0, 5.0)
    assert inputs("RandomNoise")["noise_seed"] == 77


def test_one_node_gives_the_same_as_its_parts(run, server):
    """The animated picture's node given the parts' clip, prompt and settings."""
    parts, _, wanted, _ = run("dreamix_edit")
    prompt = to_api(read("dreamix_animate_image"), server.object_info())
    clip = prompt[node_of(prompt, "RewindDemoTextEdit")]
    clip["inputs"] = dict(parts[node_of(parts, "RewindDemoTextEdit")]["inputs"])
    components = node_of(prompt, "GetVideoComponents")
    for kind in ("RewindDreamixPrompt", "RewindDreamixFineTune", "RewindDreamixCorrupt"):
        for title in CORRUPTIONS if kind == "RewindDreamixCorrupt" else (None,):
            theirs = parts[node_of(parts, kind, title)]["inputs"]
            ours = prompt[node_of(prompt, kind, title)]["inputs"]
            ours |= {name: value for name, value in theirs.items() if not isinstance(value, list)}
    prompt[node_of(prompt, "RewindDreamixPrompt")]["inputs"]["prompt"] = [node_of(prompt, "RewindDemoTextEdit"), 1]
    prompt[node_of(prompt, "RewindDreamixFineTune")]["inputs"]["images"] = [components, 0]
    prompt[node_of(prompt, "RewindDreamixCorrupt", CORRUPTIONS[0])]["inputs"]["images"] = [components, 0]
    history = server.prompt(prompt)
    assert torch.equal(frames(server, history, node_of(prompt, "PreviewImage", "Animated picture")), wanted)


def test_the_graph_for_wan_lacks_only_files(server):
    """The host refuses it for the files that are the user's own, and for nothing else."""
    assert refusals(server, "dreamix_edit_wan") == {
        ("UNETLoader", "value_not_in_list"),
        ("CLIPLoader", "value_not_in_list"),
        ("VAELoader", "value_not_in_list"),
        ("LoadVideo", "custom_validation_failed"),
    }
