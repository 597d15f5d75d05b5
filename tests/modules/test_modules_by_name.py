"""Models by name, and names by model."""

import contextlib
import sys
import types

import pytest
import torch
from torch import nn

from widthkit.errors import ModelError
from widthkit.modules.clone import named_tensors
from widthkit.modules.models import ModelName, create_model, input_channels, likely_names
from widthkit.modules.structure import plain_attributes, structure
from widthkit.trace import trace


@pytest.fixture
def zoo(monkeypatch):
    """A package of the user's with some factories."""
    module = types.ModuleType("my_zoo")
    exec(
        "from torch import nn\n"
        "def tiny(width=4, pretrained=False):\n"
        "    return nn.Conv2d(3, width + 100 * pretrained, 1)\n"
        "def broken(**kwargs):\n"
        "    raise ZeroDivisionError('division\\nby zero')\n"
        "def text():\n"
        "    return 'not a model'\n"
        "class Nets:\n"
        "    small = staticmethod(lambda: nn.Linear(2, 2))\n"
        "number = 3\n",
        module.__dict__,
    )
    monkeypatch.setitem(sys.modules, "my_zoo", module)


# --- by name ----------------------------------------------------------------------------------------------------------


def test_names_of_all_sources(zoo):
    assert create_model("torchvision/resnet18", num_classes=10).fc.out_features == 10
    assert create_model("timm/resnet18", num_classes=10, in_chans=1).conv1.in_channels == 1
    assert create_model("my_zoo:tiny", width=7).out_channels == 7
    assert create_model("my_zoo:tiny", pretrained=True).out_channels == 104
    assert isinstance(create_model("my_zoo:Nets.small"), nn.Linear)
    assert isinstance(create_model("torch.nn:Identity"), nn.Identity)
    assert ModelName("my_zoo:tiny", {"width": 3}).build().out_channels == 3


def test_detection_models_fetch_no_weights():
    model = create_model("torchvision/ssdlite320_mobilenet_v3_large")
    assert isinstance(model, nn.Module)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "unknown model 'resnet18': write torchvision/NAME, timm/NAME, package.module:factory or"),
        ("hub/resnet18", "unknown model 'hub/resnet18': write"),
        ("", "unknown model '': write"),
        ("torchvision/", "unknown model 'torchvision/': known:"),
        ("torchvision/resnet81", r"unknown model 'torchvision/resnet81': did you mean .*resnet18"),
        ("torchvision/ResNet", "unknown model 'torchvision/ResNet'"),
        ("timm/efficentnet_b0", r"unknown model 'timm/efficentnet_b0': did you mean .*efficientnet_b0"),
        ("my_zoo:tinny", "unknown model 'my_zoo:tinny': module 'my_zoo' has no attribute 'tinny'"),
        ("my_zoo:", "unknown model 'my_zoo:'"),
        (":tiny", "unknown model ':tiny'"),
        (".my_zoo:tiny", "unknown model '.my_zoo:tiny'"),
        ("no_such_zoo:tiny", "unknown model 'no_such_zoo:tiny': No module named 'no_such_zoo'"),
        ("my_zoo:number", "'my_zoo:number' is a int, not a factory"),
        ("my_zoo:text", "my_zoo:text returned str, not an nn.Module"),
        ("my_zoo:broken", r"my_zoo:broken\(\) cannot be built: ZeroDivisionError: division by zero"),
    ],
)
def test_names_that_lead_nowhere(zoo, name, message):
    with pytest.raises(ModelError, match=message) as caught:
        create_model(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18", "my_zoo:tiny"])
def test_arguments_that_a_factory_does_not_take(zoo, name):
    with pytest.raises(ModelError, match=rf"{name}\(colour='red'\) cannot be built: TypeError: .*colour"):
        create_model(name, colour="red")


def test_a_module_that_breaks_while_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "shaky_zoo.py").write_text("raise RuntimeError('no licence\\nfound')")
    (tmp_path / "typo_zoo.py").write_text("def f(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="shaky_zoo cannot be imported: RuntimeError: no licence found"):
        create_model("shaky_zoo:tiny")
    with pytest.raises(ModelError, match="typo_zoo cannot be imported: SyntaxError"):
        create_model("typo_zoo:tiny")


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Conv2d(5, 3, 1), nn.Conv2d(3, 3, 1)), 5),
        (nn.Linear(3, 3), 3),
        (nn.Conv1d(7, 3, 1), 3),
    ],
)
def test_input_channels(model, channels):
    assert input_channels(model) == channels


# --- by model ---------------------------------------------------------------------------------------------------------

NAMES = [
    ModelName("torchvision/resnet18", {"num_classes": 1000}),
    ModelName("torchvision/resnet18", {"num_classes": 7}),
    ModelName("torchvision/resnet50", {"num_classes": 1000}),
    ModelName("torchvision/mobilenet_v2", {"num_classes": 3}),
    ModelName("torchvision/densenet121", {"num_classes": 1000}),
    ModelName("torchvision/googlenet", {"num_classes": 5}),
    ModelName("torchvision/googlenet", {"num_classes": 5, "aux_logits": False, "transform_input": True}),
    ModelName("torchvision/regnet_y_400mf", {"num_classes": 10}),  # its layout is computed with tensors
    ModelName("torchvision/raft_small"),
    ModelName("torchvision/ssdlite320_mobilenet_v3_large"),
    ModelName("timm/resnet18", {"num_classes": 1000}),
    ModelName("timm/resnet18", {"num_classes": 0}),
    ModelName("timm/resnet18", {"num_classes": 10, "in_chans": 1}),
    ModelName("timm/mobilenetv2_050", {"num_classes": 10}),
    ModelName("timm/efficientnet_b0", {"num_classes": 10, "in_chans": 4}),
    ModelName("timm/resnet18", {"features_only": True}),
]


def described(model):
    """Modules, settings, plain attributes, and shapes of all tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    return structure(model), plain_attributes(model), shapes


def identify(model):
    """Return the first likely name that builds the same model, ``None`` without one."""
    for name in likely_names(model):
        with contextlib.suppress(ModelError):
            if described(name.outline()) == described(model):
                return name
    return None


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_models_are_recognised(name):
    model = name.outline()
    assert identify(model) == name
    assert all(p.is_meta for p in model.parameters() if p.ndim > 1)


def resnet(**kwargs):
    with torch.device("meta"):
        return create_model("torchvision/resnet18", **kwargs)


def timm_resnet(**kwargs):
    with torch.device("meta"):
        return create_model("timm/resnet18", **kwargs)


def changed(model, path, module):
    model.set_submodule(path, module)
    return model


def with_setting(model, path, name, value):
    setattr(model.get_submodule(path), name, value)
    return model


def test_an_outline_has_the_structure_of_the_model():
    for name in NAMES[1], NAMES[6], NAMES[-1]:
        assert described(name.outline()) == described(name.build())


CHANGED = {
    "stride": lambda: with_setting(resnet(), "layer2.0.conv1", "stride", (1, 1)),
    "padding": lambda: with_setting(resnet(), "conv1", "padding", (1, 1)),
    "pooling": lambda: changed(resnet(), "maxpool", nn.Identity()),
    "activation": lambda: changed(resnet(), "layer1.0.relu", nn.SiLU()),
    "activation of timm": lambda: timm_resnet(act_layer=nn.SiLU),
    "norm": lambda: with_setting(resnet(), "bn1", "eps", 1e-3),
    "width": lambda: changed(resnet(), "fc", nn.Linear(512, 10, bias=False)),
    "extra layer": lambda: changed(resnet(), "fc", nn.Sequential(nn.Dropout(), nn.Linear(512, 10))),
    "an option": lambda: resnet(norm_layer=nn.InstanceNorm2d),
    "stem of timm": lambda: timm_resnet(stem_type="deep"),
    "flag": lambda: with_setting(timm_resnet(), "", "drop_rate", 0.5),
    "function": lambda: with_setting(resnet(), "", "forward", lambda x: x),
    "unknown": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)),
    "nothing": nn.Identity,
}


@pytest.mark.parametrize("make", CHANGED.values(), ids=CHANGED)
def test_models_that_were_changed_are_not(make):
    assert identify(make()) is None


def test_functional_settings_tell_models_apart():
    """GoogLeNet keeps these as plain attributes, which no layer shows."""
    with torch.device("meta"):
        model = create_model("torchvision/googlenet", num_classes=5)
    model.transform_input = not model.transform_input
    name = identify(model)
    assert name.kwargs["transform_input"] is model.transform_input


def test_recognising_touches_nothing():
    model = timm_resnet(num_classes=10).train()
    model.layer1.eval()
    before = [m.training for m in model.modules()], torch.get_rng_state()
    assert identify(model) is not None
    assert [m.training for m in model.modules()] == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    # Training flags say nothing about the structure.
    assert identify(model.eval()) is not None


def test_a_slim_model_is_not_taken_for_its_dense_one():
    from widthkit.export.dense import export

    model = create_model("timm/resnet18", num_classes=10)
    graph = trace(model, (1, 3, 32, 32))
    assert identify(export(model, {graph.group_names[0]: 8}, graph=graph)) is None
    assert identify(export(model, graph.full, graph=graph)) == ModelName("timm/resnet18", {"num_classes": 10})


def test_likely_names_come_first():
    assert next(likely_names(timm_resnet(num_classes=4))) == ModelName("timm/resnet18", {"num_classes": 4})


@pytest.mark.parametrize(
    ("name", "gflops"), [("inception_v3", 5.71), ("efficientnet_b3", 1.83), ("mobilenet_v3_small", 0.06)]
)
def test_example_inputs_have_the_size_the_library_publishes_its_costs_for(name, gflops):
    macs = trace(create_model(f"torchvision/{name}")).macs()
    assert round(macs / 1e9, 2) == gflops
