"""Every format of every kind of model computes what the network computes, and failures leave nothing."""

import json

import numpy as np
import onnx
import pytest
import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import DenseNet, MobileNetV2, ResNet
from torchvision.models.resnet import BasicBlock

import widthkit as wk
from widthkit.errors import ExportError, OptionError, SlimFileError
from widthkit.export import check_same, fold_batchnorm
from widthkit.export.check import Comparison, compare, full_float32, resized, rounding_share, tolerance
from widthkit.export.formats import FORMATS, OPSET, Onnx, TorchExport

MODELS = {
    "torchvision/resnet18": {},
    "torchvision/mobilenet_v2": {},
    "timm/efficientnet_b0": {},
    "torchvision/densenet121": {},
    "timm/convnext_atto": {},
    "timm/vit_tiny_patch16_224": {"img_size": 32},
}
SHAPE = (2, 3, 32, 32)


def slimmed(name, make=None, size=32):
    """Half of every width, with batch-norm statistics and weights that are not the initial ones."""
    torch.manual_seed(0)
    model = make(7) if make else wk.create_model(name, num_classes=7, **MODELS.get(name, {}))
    graph = wk.trace(model, (1, 3, size, size))
    slim = wk.export(model, {g: max(1, w // 2) for g, w in graph.full.items()}, graph=graph)
    with torch.no_grad():
        for module in slim.modules():
            if isinstance(module, _BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    wk.recalibrate(slim, [(torch.randn(16, 3, 64, 64) if "vit" not in name else torch.zeros(2, 3, size, size), None)])
    return slim.eval()


@pytest.fixture(scope="module")
def resnet():
    return slimmed("torchvision/resnet18")


def record(path):
    return json.loads(path.with_name(path.name + ".json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_in_every_portable_format(name, tmp_path, capsys):
    slim = slimmed(name)
    said = []
    # An image size of one's own is nothing that a model could be recognised by.
    known = {"model": name, "kwargs": {"num_classes": 7, **MODELS[name]}}
    formats = ["safetensors", "pt2", "onnx"]
    paths = wk.save(slim, tmp_path / "slim", formats=formats, example_inputs=SHAPE, say=said.append, **known)
    assert sorted(p.name for p in paths) == ["slim.json", "slim.onnx", "slim.pt2", "slim.safetensors"]
    assert len(said) == 3
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = slim(x)
    program = torch.export.load(tmp_path / "slim.pt2").module()
    torch.testing.assert_close(program(x), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    graph = onnx.load(tmp_path / "slim.onnx")
    onnx.checker.check_model(graph)
    kept = record(tmp_path / "slim.onnx")
    assert kept["opset"] == OPSET == next(o.version for o in graph.opset_import if not o.domain)
    assert [c["batch"] for c in kept["checks"]] == [2, 1, 3]
    assert all(c["largest_difference"] <= c["tolerance"] * c["largest_output"] for c in kept["checks"])
    again = wk.load(tmp_path / "slim")
    again.load_state_dict(slim.state_dict(), strict=True)
    assert record(tmp_path / "slim.safetensors")["checks"][0]["largest_difference"] == 0


def b0_of_four_blocks(n):
    """EfficientNet-B0's stem, the first of the blocks of four stages (as its own factory spells them), and head."""
    stages = ["ds_r1_k3_s1_e1_c16_se0.25", "ir_r1_k3_s2_e6_c24_se0.25", "ir_r1_k5_s2_e6_c40_se0.25"]
    blocks = decode_arch_def([[stage] for stage in [*stages, "ir_r1_k3_s1_e6_c40_se0.25"]])
    return EfficientNet(blocks, num_classes=n, num_features=320, act_layer=nn.SiLU)


# The six architectures at their own widths with fewer blocks: no kind of layer is missing, but AOTInductor compiles
# for seconds where the whole models take up to a minute. benchmarks/formats.json holds the whole ones.
SMALL = {
    "resnet18": lambda n: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=n),
    "mobilenet_v2": lambda n: MobileNetV2(n, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]),
    "efficientnet_b0": b0_of_four_blocks,
    "densenet121": lambda n: DenseNet(32, (2, 2, 1, 1), num_classes=n),
    "convnext_atto": lambda n: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), num_classes=n),
    "vit_tiny": lambda n: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=n),
}
# Batch norms, and how many of them stand behind a convolution; in DenseNet most stand before one.
NORMS = {"resnet18": (12, 12), "mobilenet_v2": (13, 13), "efficientnet_b0": (13, 13), "densenet121": (17, 7)}


def few(name, n):
    """The factory that wk.load finds by the name of this module."""
    return SMALL[name](n)


def small(name):
    return slimmed(name, SMALL[name])


@pytest.fixture(scope="module", params=SMALL)
def few_blocks(request):
    return request.param, small(request.param)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_types_of_every_model(few_blocks, tmp_path, dtype):
    """In the formats that a CPU can check: onnxruntime has no bfloat16 there, AOTInductor has tests of its own."""
    name, slim = few_blocks
    formats = ["safetensors", "pt2", *(["onnx"] if dtype == "fp16" else [])]
    known = {"model": f"{__name__}:few", "kwargs": {"name": name, "n": 7}}
    wk.save(slim, tmp_path / "h", formats=formats, example_inputs=SHAPE, dtype=dtype, say=None, **known)
    long = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    again = wk.load(tmp_path / "h", allow=[known["model"]])
    assert {p.dtype for p in again.parameters()} == {long}
    for file in (".safetensors", ".pt2", ".onnx")[: len(formats)]:
        kept = record(tmp_path / f"h{file}")
        assert kept["dtype"] == str(long).removeprefix("torch.")
        assert all(0 < c["largest_difference"] <= c["tolerance"] * c["largest_output"] for c in kept["checks"])
        # Below half of what any network may be off: none of these is so touchy that the check says nothing.
        assert kept["checks"][0]["tolerance"] < 0.25
    if dtype == "fp16":
        graph = onnx.load(tmp_path / "h.onnx").graph
        assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_channels_last_and_folded_batch_norms_of_every_model(few_blocks, tmp_path):
    name, slim = few_blocks
    before = {n: t.clone() for n, t in slim.state_dict().items()}
    options = {"example_inputs": SHAPE, "channels_last": True, "fold_bn": True, "say": None}
    wk.save(slim, tmp_path / "f", formats=["pt2"], **options)
    total, gone = NORMS.get(name, (0, 0))
    assert total == sum(isinstance(m, _BatchNorm) for m in slim.modules())
    program = torch.export.load(tmp_path / "f.pt2")
    assert total - gone == sum("batch_norm" in str(n.target) for n in program.graph.nodes)
    kept = record(tmp_path / "f.pt2")
    assert (kept["memory_format"], kept["folded_batch_norms"]) == ("channels_last", gone)
    assert all(c["largest_difference"] <= 1e-4 * c["largest_output"] for c in kept["checks"])
    wide = [t for t in program.state_dict.values() if t.ndim == 4 and min(t.shape) > 1]
    assert wide
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in wide)
    assert all(torch.equal(before[n], t) for n, t in slim.state_dict().items())


@pytest.fixture(scope="module")
def quick_wrapper():
    """The wrapper calls the kernels and is not what is fast; unoptimised it compiles in a third less time."""
    with torch._inductor.config.patch("aot_inductor.compile_wrapper_opt_level", "O0"):
        yield


@pytest.mark.usefixtures("quick_wrapper")
def test_aot_inductor_packages_of_every_model_run_another_batch_size(few_blocks, tmp_path):
    _, slim = few_blocks
    (path,) = wk.save(slim, tmp_path / "slim", formats=["aoti"], example_inputs=SHAPE, say=None)
    assert path.name == "slim.aoti-cpu.pt2"
    package = torch._inductor.aoti_load_package(str(path))
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(package(x), slim(x), rtol=0, atol=1e-4 * float(slim(x).abs().max()))


@pytest.mark.usefixtures("quick_wrapper")
def test_aot_inductor_takes_every_variant_at_once(tmp_path):
    options = {"dtype": "bf16", "channels_last": True, "fold_bn": True, "say": None}
    (path,) = wk.save(small("mobilenet_v2"), tmp_path / "s", formats=["aoti"], example_inputs=SHAPE, **options)
    kept = record(path)
    assert (kept["dtype"], kept["memory_format"], kept["folded_batch_norms"]) == ("bfloat16", "channels_last", 13)
    package = torch._inductor.aoti_load_package(str(path))
    x = torch.randn(5, 3, 32, 32).to(torch.bfloat16, memory_format=torch.channels_last)
    assert package(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "left"), [("torchvision/resnet18", 0), ("timm/efficientnet_b0", 0), ("torchvision/densenet121", 62)]
)
def test_batch_norms_fold_where_a_convolution_feeds_them_alone(name, left):
    slim = slimmed(name).double()
    before = {n: t.clone() for n, t in slim.state_dict().items()}
    total = sum(isinstance(m, _BatchNorm) for m in slim.modules())
    folded, count = fold_batchnorm(slim, SHAPE)
    assert total - count == left == sum(isinstance(m, _BatchNorm) for m in folded.modules())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), slim(x), rtol=0, atol=1e-9 * float(slim(x).abs().max()))
    assert all(torch.equal(before[n], t) for n, t in slim.state_dict().items())


class Tricky(nn.Module):
    """A batch norm on a convolution that something else reads too, one that is used twice, one that can be folded."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.na, self.shared, self.nu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(6)
        for norm in (self.na, self.shared, self.nu):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        a = self.a(x)
        y = a + self.na(a)
        y = self.shared(self.b(y)) + self.shared(self.c(y))
        return self.nu(self.up(y))


def test_folding_leaves_what_would_change_the_result():
    torch.manual_seed(0)
    net = Tricky().double().eval()
    folded, count = fold_batchnorm(net, (2, 3, 8, 8))
    assert count == 1
    assert isinstance(folded.nu, nn.Identity)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(folded(x), net(x), rtol=0, atol=1e-12)


def test_folded_network_is_exported_and_safetensors_refuses_it(resnet, tmp_path):
    with pytest.raises(OptionError, match="cannot be folded"):
        wk.save(resnet, tmp_path / "f", formats=["safetensors", "pt2"], fold_bn=True, example_inputs=SHAPE)
    wk.save(resnet, tmp_path / "f", formats=["pt2"], fold_bn=True, example_inputs=SHAPE, say=None)
    assert record(tmp_path / "f.pt2")["folded_batch_norms"] == 20
    program = torch.export.load(tmp_path / "f.pt2")
    assert not [n for n in program.graph.nodes if "batch_norm" in str(n.target)]


class Wrong(TorchExport):
    """Writes another network than it was given."""

    def write(self, prepared, path):
        for p in prepared.net.parameters():
            p.data.add_(0.01)
        return super().write(prepared, path)


class Broken(Onnx):
    def write(self, prepared, path):
        path.write_bytes(b"half a file")
        raise ValueError("no\nmore")


@pytest.mark.parametrize("order", [["wrong", "safetensors"], ["safetensors", "wrong"], ["pt2", "broken"]])
def test_a_mismatch_or_a_crash_leaves_no_file(resnet, tmp_path, monkeypatch, order):
    monkeypatch.setitem(FORMATS, "wrong", Wrong())
    monkeypatch.setitem(FORMATS, "broken", Broken())
    before = {n: t.clone() for n, t in resnet.state_dict().items()}
    with pytest.raises(ExportError, match="nothing was written") as caught:
        wk.save(resnet, tmp_path / "new" / "slim", formats=order, example_inputs=SHAPE, say=None)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(before[n], t) for n, t in resnet.state_dict().items())


def test_the_supernet_is_the_reference_and_others_are_refused(tmp_path):
    torch.manual_seed(0)
    model = wk.create_model("timm/resnet10t", num_classes=5)
    net = wk.make_supernet(model, "bc", example_inputs=(1, 3, 32, 32), k=4).eval()
    widths = net.space.sample(np.random.default_rng(0))
    slim = wk.export(net, widths)
    net.set_widths(widths)
    assert check_same(net, slim, SHAPE).largest_difference < 1e-6
    wk.save(slim, tmp_path / "s", formats=["pt2"], example_inputs=SHAPE, reference=net, say=None)
    assert record(tmp_path / "s.pt2")["compared_with"] == "Supernet"
    with pytest.raises(ExportError, match="differs from the reference"):
        wk.save(slim, tmp_path / "t", formats=["pt2"], example_inputs=SHAPE, reference=net.set_widths(), say=None)
    assert not list(tmp_path.glob("t*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["onnxx"]}, "did you mean onnx"),
        ({"formats": "onnx"}, "takes a list"),
        ({"formats": []}, "no format"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"formats": ["onnx"], "dtype": "bf16", "example_inputs": SHAPE}, "no bfloat16"),
    ],
)
def test_options_that_make_no_sense_are_refused(resnet, tmp_path, options, message):
    with pytest.raises((OptionError, ExportError), match=message):
        wk.save(resnet, tmp_path / "slim", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_that_torch_export_cannot_read_is_refused_in_one_line(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(ExportError, match=r"torch\.export cannot read Branch") as caught:
        wk.save(Branch(), tmp_path / "slim", formats=["pt2"], example_inputs=(2, 3), say=None)
    assert "\n" not in str(caught.value)
    with pytest.raises(SlimFileError, match="not made by"):
        wk.save(nn.Linear(2, 2), tmp_path / "slim", example_inputs=(2, 2))
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_recorded_are_removed_again(resnet, tmp_path):
    in_the_way = tmp_path / "s.pt2.json"
    in_the_way.mkdir()
    with pytest.raises(OptionError, match=r"cannot write .*s\.pt2\.json"):
        wk.save(resnet, tmp_path / "s", formats=["safetensors", "pt2"], example_inputs=SHAPE, say=None)
    assert list(tmp_path.iterdir()) == [in_the_way]


@pytest.mark.parametrize("usual", [True, False])
def test_comparisons_on_cuda_do_not_round_to_tf32_and_settings_come_back(usual):
    """The settings are read and written without a GPU too."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=True, allow_tf32=usual):
        with full_float32(torch.device("cpu")):
            assert cudnn.allow_tf32 == usual
        with full_float32(torch.device("cuda")):
            assert (cudnn.allow_tf32, cudnn.enabled, cudnn.benchmark) == (False, True, True)
            assert torch.get_float32_matmul_precision() == "highest"
        assert (cudnn.allow_tf32, cudnn.enabled, cudnn.benchmark) == (usual, True, True)


def test_comparisons_see_shapes_nan_and_size():
    ones = torch.ones(2, 3)
    assert not compare(ones, torch.full((2, 3), float("nan")), 1.0, 2).passed
    assert not compare((ones, ones), (ones, ones * 1.2), 0.1, 2).passed
    assert compare((ones, ones), [ones, ones * 1.05], 0.1, 2).passed
    with pytest.raises(ExportError, match="shapes"):
        compare(ones, torch.ones(3, 2), 1.0, 2)
    assert Comparison(1, 0.0, 0.0, 0.1).passed
    assert resized((ones,), 5)[0].shape == (5, 3)


def test_tolerance_follows_the_networks_own_sensitivity():
    wide = nn.Linear(1, 2, bias=False)
    with torch.no_grad():  # outputs of +-1000 cancel in the sum, so rounding matters as much as the result
        wide.weight.copy_(torch.tensor([[1000.3], [-1000.0]]))
    touchy = nn.Sequential(wide, nn.Linear(2, 1, bias=False))
    nn.init.ones_(touchy[1].weight)
    share = rounding_share(touchy, (torch.ones(1, 1),), torch.bfloat16)
    assert share > 0.9
    assert tolerance(torch.bfloat16, share) == 0.5
    assert tolerance(torch.float32, share=0.0) == 1e-4
    assert rounding_share(touchy, (torch.ones(1, 1),), torch.float32) == 0
