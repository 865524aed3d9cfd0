"""EI²'s graphs run as they are, through the server, and show the known answer; that of SD 1.5 has the same wiring."""

from __future__ import annotations

import re
from types import SimpleNamespace

import comfy_host
import graph
import one_shot
import pytest
import tiny_models
from graph import link_ends, to_api
from results import frames, node_of
from shipped import LONGEST, Runs, behind_loaders, inner_settings, note, read, refusals, settings, tunes

BLUEPRINT = comfy_host.ROOT / "subgraphs" / "EI2 Edit.json"
RESULTS = ("ei2_edit", "ei2_load_weights")
TITLE = "Edited clip"  # of the preview of their results
TUNE, SAVE, LOAD, CLIP = one_shot.TUNE, "RewindEI2SaveWeights", "RewindEI2LoadWeights", "RewindDemoTextEdit"
EMBEDDED = ("rewind_demo_svd", "rewind_demo_t2v", "rewind_demo_t2i")  # the VAE, the text encoder, the UNet
LOADERS = {"RewindDemoTextToImage", "CheckpointLoaderSimple", CLIP}
TEXTS = (
    "Caption: what the clip shows",
    "Prompt: what it is to show",
    "Empty prompt: to rewind by, and negative",
)  # titles
# What only the demo has: its clip's words, and the true edit of it.
OF_THE_DEMO = {
    *((f"CLIPTextEncode {title}", "text") for title in TEXTS[:2]),
    (f"{SAVE} ", "caption"),
    ("PreviewImage True edit", "images"),
}
# What is another for a large model: inside the subgraph, and more of it on its node.
OF_THE_MODEL = {"text", "steps", "learning_rate", "cfg"}
ON_THE_NODE = OF_THE_MODEL | {"strength", "gradient_checkpointing"}


@pytest.fixture(scope="module")
def tuned(host, server, trained) -> bool:
    """Whether the tuned weights are those that come with Rewind; random ones are put in their place otherwise."""
    image, weights = host.module("demo.text_to_image"), host.module("pipelines.ei2.weights")
    pack = server.base / "custom_nodes" / comfy_host.PACK_NAME
    file = pack / image.EI2_WEIGHTS.relative_to(host.pack)
    if file.exists():
        return True
    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=image.build_image_unet()))
    weights.save_weights(file, one_shot.random_weights(host, model))
    return False


@pytest.fixture(scope="module")
def run(host, server, trained, tuned):
    """A function: a graph run as it was saved, once (`shipped.Ran`)."""
    runs = Runs(server)

    def once(name: str) -> tuple:
        if name == "ei2_edit" and not tunes(host):
            pytest.skip("this ComfyUI cannot copy a model to tune: what it says of that is tested")
        return runs(name, TITLE)

    return once


def saved(server):
    """The files in models/ei2."""
    return set((server.base / "models" / "ei2").rglob("*.safetensors"))


# --- as saved --------------------------------------------------------------------------------------------------------


def test_ei2_edit_runs_in_time_and_keeps_what_it_learnt(host, run, server):
    prompt, history, result, seconds = run("ei2_edit")
    assert result.shape == (8, 96, 96, 3) and float(result.std()) > 0.01
    assert seconds <= LONGEST
    (picture,) = history["outputs"][node_of(prompt, TUNE)]["images"]
    assert picture["filename"].endswith(".png")
    kept = [host.module("pipelines.ei2.weights").load_weights(file) for file in saved(server)]
    clip, tuning = (prompt[node_of(prompt, kind)]["inputs"] for kind in (CLIP, TUNE))
    caption = host.module("demo.text_edits").text_example(clip["seed"], clip["edit"]).caption
    assert [one.caption for one in kept if one.about["steps"] == tuning["steps"]] == [caption]


def test_ei2_load_weights_runs_in_time_on_every_host(run):
    prompt, history, result, seconds = run("ei2_load_weights")
    assert result.shape == (8, 96, 96, 3) and float(result.std()) > 0.01
    assert seconds <= LONGEST
    (table,) = history["outputs"][node_of(prompt, "PreviewAny")]["text"]
    blocks, *at_levels = (part.splitlines()[2:] for part in table.split("\n\n"))
    assert blocks and all(re.fullmatch(r"\| \w+\.\d[\w.]*( \| \d\.\d{4}){2} \|", row) for row in blocks)
    assert len(at_levels) == 2 and all(len(rows) == len(blocks) + 1 for rows in at_levels), "a row for all blocks"
    assert all(re.fullmatch(r"\| [\w. ]+( \| \d\.\d{4}){5} \|", row) for rows in at_levels for row in rows)


def test_the_note_says_that_it_tunes_less_than_a_run_that_counts():
    (tuning,) = [node for node in read("ei2_edit")["nodes"] if node["type"] == TUNE]
    text = note("ei2_edit")
    shown = int(re.search(r"tunes for (\d+) steps", text)[1])
    assert tuning["widgets_values"][0] == shown < int(re.search(r"\*\*A run that counts\*\* takes (\d+)", text)[1])


def test_without_tuning_it_runs_on_every_host(server, trained):
    """0 steps leave the attention alone."""
    prompt, before = to_api(read("ei2_edit"), server.object_info()), saved(server)
    prompt[node_of(prompt, TUNE)]["inputs"]["steps"] = 0
    prompt[node_of(prompt, "BasicScheduler")]["inputs"]["steps"] = 3
    history = server.prompt(prompt)
    assert frames(server, history, node_of(prompt, "PreviewImage", TITLE)).shape == (8, 96, 96, 3)
    (file,) = saved(server) - before
    assert file.stat().st_size < 2000, "there is nothing to keep but what is said of it"


def test_a_host_that_cannot_tune_says_so(host, server, trained):
    if tunes(host):
        pytest.skip("this ComfyUI can copy a model")
    with pytest.raises(RuntimeError, match="needs a ComfyUI that can copy a model .*update ComfyUI"):
        server.prompt(to_api(read("ei2_edit"), server.object_info()))


# --- the known answer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESULTS)
def test_it_shows_the_known_answer(host, server, tuned, run, name):
    pack = server.base / "custom_nodes" / comfy_host.PACK_NAME
    if not tiny_models.ensure_weights(host, pack, EMBEDDED):
        pytest.skip("the embedded models' weights are not all there: with random ones the frames mean nothing")
    if name == "ei2_load_weights" and not tuned:
        pytest.skip("demo/ei2 holds no tuned weights yet: with random ones the frames mean nothing")
    prompt, _, result, _ = run(name)
    edits, clip = host.module("demo.image_edits"), prompt[node_of(prompt, CLIP)]["inputs"]
    variant = clip["seed"] % host.module("demo.text_edits").VARIANTS[clip["edit"]]
    (kind,) = [kind for kind, of_texts in edits.EDITS.items() if of_texts == (clip["edit"], variant)]
    asked = edits.image_edit(clip["seed"], kind)
    assert not edits.score(asked, asked.example.source).success
    scores = edits.score(asked, result.movedim(-1, 1))
    assert scores.success, scores


# --- one wiring ------------------------------------------------------------------------------------------------------


def test_the_graph_for_sd15_has_the_same_wiring(monkeypatch):
    monkeypatch.setattr(graph, "LOADERS", graph.LOADERS | LOADERS)
    own, large = link_ends(read("ei2_edit")), link_ends(read("ei2_edit_sd15"))
    assert own.keys() >= OF_THE_DEMO
    assert behind_loaders(large) == {end: start for end, start in own.items() if end not in OF_THE_DEMO}


def test_its_settings_are_those_of_the_parts(server):
    """Those inside, which the page shows when the subgraph is opened, and those on the node."""
    info, own = server.object_info(), read("ei2_edit")
    parts = settings(own["nodes"], own["links"], info)
    promoted, inside = inner_settings(read("ei2_edit_sd15"), info)
    for found, allowed in ((promoted, ON_THE_NODE), (inside, OF_THE_MODEL)):
        assert {kind for kind, _, _ in found} >= {TUNE, "RewindEDMInversion", "BasicScheduler", "CFGGuider"}
        differ = {key for key, value in found.items() if parts.get(key, "") != value}
        assert {key[2] for key in differ} <= allowed


def test_the_settings_on_the_node_reach_their_parts(server):
    workflow = read("ei2_edit_sd15")
    (node,) = [node for node in workflow["nodes"] if node.get("title") == BLUEPRINT.stem]
    node["widgets_values"] = ["a cat", "a dog", 77, 0.02, "first frame", 13, 5.0, 0.6, 3, 99, False]
    prompt = to_api(workflow, server.object_info())

    def inputs(kind: str, title: str | None = None) -> dict:
        return prompt[node_of(prompt, kind, title)]["inputs"]

    tuning, inversion = inputs(TUNE), inputs("RewindEDMInversion")
    assert (tuning["steps"], tuning["learning_rate"], tuning["attention"]) == (77, 0.02, "first frame")
    assert (tuning["seed"], tuning["gradient_checkpointing"]) == (99, False)
    assert (inversion["strength"], inversion["refine"]) == (0.6, 3)
    assert (inputs("BasicScheduler")["steps"], inputs("CFGGuider")["cfg"]) == (13, 5.0)
    texts = [inputs("CLIPTextEncode", title)["text"] for title in TEXTS]
    assert texts == ["a cat", "a dog", ""]


def test_the_graph_for_sd15_lacks_only_files(server):
    """The host refuses it for the files that are the user's own, and for nothing else."""
    assert refusals(server, "ei2_edit_sd15") == {
        ("CheckpointLoaderSimple", "value_not_in_list"),
        ("LoadVideo", "custom_validation_failed"),
    }
