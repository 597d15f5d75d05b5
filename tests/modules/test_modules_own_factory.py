"""Models from a user's own file: ``FILE.py:factory``."""

import copy
import io
import pickle
import sys

import pytest
import torch
from torch import nn

import widthkit as wk
from widthkit.errors import ModelError, SlimFileError
from widthkit.modules.models import takes_argument
from widthkit.trace import trace

MODEL = """
from __future__ import annotations

from dataclasses import dataclass

import neighbour_of_net
from torch import nn


@dataclass
class Form:
    width: int = neighbour_of_net.WIDTH


class Net(nn.Module):
    def __init__(self, form: Form, classes: int):
        super().__init__()
        self.form = form
        self.conv = nn.Conv2d(3, form.width, 3, padding=1)
        self.out = nn.Conv2d(form.width, form.width, 3, padding=1)
        self.fc = nn.Linear(form.width, classes)

    def forward(self, x):
        return self.fc(self.out(self.conv(x).relu()).relu().mean((2, 3)))


def net(num_classes=4):
    return Net(Form(), num_classes)


def plain(width=8):
    return Net(Form(width), 4)


def anything(**options):
    return Net(Form(), options.get("num_classes", 5))


number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "my-net.py").write_text(MODEL)
    (tmp_path / "nets" / "neighbour_of_net.py").write_text("WIDTH = 6\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "neighbour_of_net", raising=False)
    yield tmp_path
    sys.modules.pop("neighbour_of_net", None)


def test_a_file_with_a_neighbour(folder, monkeypatch):
    path = list(sys.path)
    model = wk.create_model("nets/my-net.py:net", num_classes=9)
    assert (model.fc.out_features, model.conv.out_channels) == (9, 6)
    assert sys.path == path
    assert type(wk.create_model(f"{folder}/nets/my-net.py:plain", width=3)) is type(model)
    monkeypatch.chdir(folder / "nets")
    assert wk.create_model("my-net.py:anything").fc.out_features == 5


def test_its_classes_can_be_copied_and_pickled(folder):
    model = wk.create_model("nets/my-net.py:net")
    assert type(model).__module__ == "widthkit_file_my-net"
    assert copy.deepcopy(model).form == model.form
    assert isinstance(pickle.loads(pickle.dumps(model)), type(model))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=False).form == model.form


def test_two_files_of_one_name(folder):
    (folder / "other").mkdir()
    (folder / "other" / "my-net.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(2, 2)\n")
    assert wk.create_model("nets/my-net.py:net").form.width == 6
    assert isinstance(wk.create_model("other/my-net.py:net"), nn.Linear)
    assert wk.create_model("nets/my-net.py:net").form.width == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nets/none.py:net", r"there is no file /.*/nets/none\.py; write FILE\.py:factory"),
        (
            "nets/my-net.py:nett",
            r"unknown model 'nets/my-net\.py:nett': module 'widthkit_file_my-net' has no attribute",
        ),
        ("nets/my-net.py:number", "is a int, not a factory"),
        ("nets/my-net.py", r"unknown model 'nets/my-net\.py': write .* or FILE\.py:factory"),
        ("broken.py:net", r"broken\.py cannot be imported: ZeroDivisionError"),
        ("lonely.py:net", r"unknown model 'lonely\.py:net': No module named 'no_such_neighbour'"),
    ],
)
def test_names_that_lead_nowhere(folder, name, message):
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "lonely.py").write_text("import no_such_neighbour\n")
    with pytest.raises(ModelError, match=message) as caught:
        wk.create_model(name)
    assert "\n" not in str(caught.value)
    assert "widthkit_file_broken" not in sys.modules


def test_which_arguments_a_factory_takes(folder):
    assert takes_argument("nets/my-net.py:net", "num_classes")
    assert takes_argument("nets/my-net.py:anything", "num_classes")
    assert not takes_argument("nets/my-net.py:plain", "num_classes")
    assert takes_argument("timm/resnet18", "num_classes")
    assert takes_argument("torchvision/resnet18", "num_classes")


def test_a_slim_network_records_the_name_as_it_was_given(folder):
    model = wk.create_model("nets/my-net.py:net").eval()
    graph = trace(model, (1, 3, 8, 8))
    slim = wk.export(model, {"conv": 3, "out": 2}, graph=graph).eval()
    wk.save(slim, folder / "slim", model="nets/my-net.py:net")
    with pytest.raises(SlimFileError, match=r"names the factory 'nets/my-net\.py:net'; pass allow="):
        wk.load(folder / "slim")
    loaded = wk.load(folder / "slim", allow=["nets/my-net.py:net"])
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x), slim(x))


def test_a_slim_network_moves_with_its_folder(folder, monkeypatch):
    model = wk.create_model("nets/my-net.py:net").eval()
    slim = wk.export(model, {"conv": 3}, graph=trace(model, (1, 3, 8, 8)))
    wk.save(slim, folder / "nets" / "slim", model="nets/my-net.py:net")
    (folder / "moved").mkdir()
    (folder / "nets").rename(folder / "moved" / "nets")
    monkeypatch.chdir(folder / "moved")
    assert wk.load("nets/slim", allow=["nets/my-net.py:net"]).conv.out_channels == 3


def test_tensors_of_a_module_have_values_after_loading(folder):
    """The model is first built on the meta device, and the module is imported then."""
    text = "import torch\nfrom torch import nn\nSHIFT = torch.tensor([2.0])\n"
    text += "class Net(nn.Conv2d):\n    def forward(self, x):\n        return super().forward(x) + SHIFT\n"
    (folder / "shifted.py").write_text(
        text + "def net():\n    return nn.Sequential(Net(3, 4, 1), nn.Conv2d(4, 2, 1))\n"
    )
    model = wk.create_model("shifted.py:net").eval()
    slim = wk.export(model, {"0": 3}, graph=trace(model, (1, 3, 8, 8))).eval()
    wk.save(slim, folder / "slim", model="shifted.py:net")
    x = torch.randn(2, 3, 8, 8)
    truth = slim(x)
    del sys.modules["widthkit_file_shifted"]
    assert torch.equal(wk.load(folder / "slim", allow=["shifted.py:net"])(x), truth)
