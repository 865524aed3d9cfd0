"""The table between diffusers' names and the checkpoint's is a bijection and loses nothing."""

import pytest
import torch

from rewind.demo.keys import (
    QUANT_CONV,
    from_checkpoint,
    image_from_checkpoint,
    image_to_checkpoint,
    image_unet_table,
    split_checkpoint,
    text_from_checkpoint,
    text_to_checkpoint,
    to_checkpoint,
    unet_table,
    vae_table,
)
from rewind.demo.models import ImageToVideoConfig, build_image_encoder, build_unet, build_vae
from rewind.demo.text import build_text_encoder
from rewind.demo.text_to_image import TextToImageConfig, build_image_unet


@pytest.fixture(scope="module", params=[(64, 128), (64, 128, 128)], ids=str)
def config(request):
    return ImageToVideoConfig(unet_channels=request.param)


@pytest.fixture(scope="module")
def parts(config):
    torch.manual_seed(0)
    models = {"unet": build_unet(config), "vae": build_vae(config), "image_encoder": build_image_encoder(config)}
    return {name: model.state_dict() for name, model in models.items()}


def test_the_tables_are_bijections_onto_distinct_names(config, parts):
    for name, table in (("unet", unet_table(config)), ("vae", vae_table(config))):
        assert set(table) == set(parts[name]) - set(QUANT_CONV)
        assert len(set(table.values())) == len(table)


def test_there_and_back_changes_nothing(config, parts):
    back = from_checkpoint(to_checkpoint(parts, config), config)
    for part in parts:
        assert back[part].keys() == parts[part].keys()
        assert all(torch.equal(back[part][name], tensor) for name, tensor in parts[part].items())


def test_weights_of_another_architecture_are_refused(config, parts):
    without = {name: t for name, t in parts["unet"].items() if name != "conv_in.weight"}
    with pytest.raises(ValueError, match="UNet.*missing.*conv_in.weight"):
        to_checkpoint(parts | {"unet": without}, config)


@pytest.fixture(scope="module")
def text_parts(parts):
    torch.manual_seed(1)
    weights = {name.removeprefix("text_model."): t for name, t in build_text_encoder().state_dict().items()}
    return {"unet": parts["unet"], "text_encoder": weights}


def test_the_text_models_parts_go_there_and_back(config, text_parts):
    checkpoint = text_to_checkpoint(text_parts, config)
    assert len(checkpoint) == sum(map(len, text_parts.values()))
    back = text_from_checkpoint(checkpoint, config)
    assert back.keys() == text_parts.keys()
    for part in text_parts:
        assert back[part].keys() == text_parts[part].keys()
        assert all(torch.equal(back[part][name], tensor) for name, tensor in text_parts[part].items())


def test_both_of_transformers_names_are_stored_as_stable_diffusions(config, text_parts):
    older = {f"text_model.{name}": tensor for name, tensor in text_parts["text_encoder"].items()}
    stored = text_to_checkpoint(text_parts, config)
    assert stored.keys() == text_to_checkpoint(text_parts | {"text_encoder": older}, config).keys()
    names = {name for name in stored if not name.startswith("model.diffusion_model.")}
    assert all(name.startswith("cond_stage_model.transformer.text_model.") for name in names)
    assert "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight" in names
    split = split_checkpoint(stored)
    assert set(split["text_encoder"]) == set(older) and split["vae"] == split["image_encoder"] == {}


def test_another_unet_is_refused_with_a_text_encoder_too(config, text_parts):
    without = {name: t for name, t in text_parts["unet"].items() if name != "conv_in.weight"}
    with pytest.raises(ValueError, match="UNet.*missing.*conv_in.weight"):
        text_to_checkpoint(text_parts | {"unet": without}, config)


# --- text to image ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(64, 128, 128), (64, 64), (64, 128, 128, 192)], ids=str)
def image_config(request):
    return TextToImageConfig(unet_channels=request.param)


@pytest.fixture(scope="module")
def image_unet(image_config):
    torch.manual_seed(2)
    return build_image_unet(image_config).state_dict()


def test_the_image_unets_table_is_a_bijection_onto_distinct_names(image_config, image_unet):
    table = image_unet_table(image_config)
    assert set(table) == set(image_unet) and len(set(table.values())) == len(table)


def test_the_image_unet_goes_there_and_back(image_config, image_unet):
    checkpoint = image_to_checkpoint(image_unet, image_config)
    assert len(checkpoint) == len(image_unet)
    assert all(name.startswith("model.diffusion_model.") for name in checkpoint)
    back = image_from_checkpoint(checkpoint, image_config)
    assert back.keys() == image_unet.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in image_unet.items())


def test_another_image_unet_is_refused(image_config, image_unet):
    without = {name: tensor for name, tensor in image_unet.items() if name != "conv_in.weight"}
    with pytest.raises(ValueError, match="UNet.*missing.*conv_in.weight"):
        image_to_checkpoint(without, image_config)
