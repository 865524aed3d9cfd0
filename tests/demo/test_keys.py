"""The table between diffusers' names and the checkpoint's is a bijection and loses nothing."""

import pytest
import torch

from rewind.demo.keys import QUANT_CONV, from_checkpoint, to_checkpoint, unet_table, vae_table
from rewind.demo.models import ImageToVideoConfig, build_image_encoder, build_unet, build_vae


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
