"""The form of a model's inputs: given values, timm's and torchvision's configurations, and their order."""

import math

import pytest
import timm
from torch import nn
from torchvision import models

from widthkit.errors import ModelError, OptionError
from widthkit.modules.inputs import InputForm, check_normalisation, input_form, scaled

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_timms_configuration():
    model = timm.create_model("vit_tiny_patch16_224")
    form = input_form("timm/vit_tiny_patch16_224", model, 3, trained=True)
    assert form == InputForm(
        (0.5,) * 3, (0.5,) * 3, (224, 224), 0.9, "bicubic", "timm's data config of vit_tiny_patch16_224"
    )
    # A factory of the user's own may return a model of timm.
    assert input_form("nets.py:vit", model, 3, trained=True) == form


def test_another_crop_mode_is_said():
    model = timm.create_model("resnet10t", pretrained_cfg_overlay={"crop_mode": "squash"})
    form = input_form("timm/resnet10t", model, 3, trained=True)
    assert "its own crop mode is squash" in form.source


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_b2", "vit_b_16"])
def test_torchvisions_weights(name):
    form = input_form(f"torchvision/{name}", nn.Identity(), 3, trained=True)
    preset = models.get_model_weights(name).DEFAULT.transforms()
    assert (form.mean, form.std) == (tuple(preset.mean), tuple(preset.std))
    assert (list(form.size), scaled(form.size[0], form.crop_pct)) == (preset.crop_size * 2, preset.resize_size[0])
    assert form.interpolation == preset.interpolation.value
    assert form.source == f"torchvision's default weights of {name}"


@pytest.mark.parametrize(
    ("crop", "resized"), [(224, 232), (224, 230), (224, 236), (240, 255), (299, 342), (300, 320), (256, 272)]
)
def test_the_resized_side_is_exact(crop, resized):
    assert scaled(crop, crop / resized) == resized


@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.95), (224, 0.9), (288, 0.96), (240, 0.94), (300, 0.904)])
def test_timm_rounds_the_resized_side_down(size, crop_pct):
    assert scaled(size, crop_pct) == math.floor(size / crop_pct)


@pytest.mark.parametrize("name", ["torchvision/fasterrcnn_resnet50_fpn", "torchvision/r3d_18", "my_nets:resnet"])
def test_models_without_a_configuration(name):
    assert input_form(name, nn.Identity(), 3, trained=True) == InputForm()


def test_fresh_weights_have_no_configuration():
    model = timm.create_model("resnet10t")
    assert input_form("timm/resnet10t", model, 3, trained=False) == InputForm()


def test_given_values_come_first_and_keep_size_and_crop():
    model = timm.create_model("resnet18")
    form = input_form("timm/resnet18", model, 3, trained=True, mean=[0.1, 0.2, 0.3], std=[0.5])
    assert (form.mean, form.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert (form.size, form.crop_pct, form.interpolation) == ((224, 224), 0.95, "bicubic")
    assert form.source.startswith("the given mean and deviation; size, crop")
    form = input_form("x:y", nn.Identity(), 1, trained=True, mean=[0.1], std=[0.5])
    assert form == InputForm((0.1,), (0.5,), source="the given mean and deviation")


def test_a_grey_model_takes_the_average():
    form = input_form("timm/resnet10t", timm.create_model("resnet10t", in_chans=1), 1, trained=True)
    assert form.mean == pytest.approx((sum(MEAN) / 3,))
    assert form.std == pytest.approx((sum(STD) / 3,))
    assert form.source.endswith("averaged for grey")


def test_other_channels_need_given_values():
    model = timm.create_model("resnet10t", in_chans=4)
    with pytest.raises(ModelError, match="is for 3 channels, the model takes 4; pass mean and std"):
        input_form("timm/resnet10t", model, 4, trained=True)
    assert input_form("timm/resnet10t", model, 4, trained=True, mean=[0.5], std=[0.5]).mean == (0.5,) * 4


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], None, "mean needs std beside it"),
        (None, [0.5], "std needs mean beside it"),
        ([0.5, 0.5], [0.5], "mean has 2 values; the model takes 3 channels"),
        ([], [0.5], "mean has 0 values"),
        ([123.0], [58.0], "mean must be shares of 0..1, not 123; divide grey levels by 255"),
        ([0.5], [0.2, 0.0, 0.2], "std must be shares of 0..1 above 0, not 0.2 0 0.2"),
        ([math.nan], [0.5], "mean must be shares"),
        ([-0.1], [0.5], "mean must be shares"),
    ],
)
def test_values_that_are_refused(mean, std, message):
    with pytest.raises(OptionError) as caught:
        check_normalisation(mean, std, 3)
    assert message in str(caught.value)
