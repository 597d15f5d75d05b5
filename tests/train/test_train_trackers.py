import json

import accelerate.tracking
import pytest
import torch
from accelerate.tracking import GeneralTracker, get_available_trackers
from torch import nn

from widthkit.errors import OptionError
from widthkit.train import train

BATCHES = [(torch.eye(2), torch.tensor([0, 1]))] * 3
QUIET = {"device": "cpu", "progress": False}


class Notebook(GeneralTracker):
    """Writes what it is told into a list, and into a file in its folder."""

    name = "notebook"
    requires_logging_directory = True
    told = []

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.folder = logging_dir

    @property
    def tracker(self):
        return self.told

    def start(self):
        self.told.append("start")

    def store_init_configuration(self, values):
        assert all(isinstance(value, (str, float, int, bool)) for value in values.values())
        self.told.append(("settings", values))

    def log(self, values, step=None, **kwargs):
        self.told.append((step, values))

    def finish(self):
        self.told.append("finish")


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    monkeypatch.setattr(Notebook, "told", [])
    return Notebook


def figures(entry):
    return {name: value for name, value in entry.items() if name != "epoch"}


def test_a_tracker_is_told_settings_and_every_epoch(notebook, tmp_path):
    options = {"lr": 0.25, "schedule": "milestones", "milestones": (1,), "seed": 4}
    result = train(nn.Linear(2, 2), BATCHES, 2, trackers=["notebook"], out=tmp_path, **options, **QUIET)
    start, (name, values), *epochs, finish = notebook.told
    assert (start, name, finish) == ("start", "settings", "finish")
    assert (values["lr"], values["milestones"], values["seed"], values["epochs"]) == (0.25, "(1,)", 4, 2)
    assert epochs == [(1, figures(result.history[0])), (2, figures(result.history[1]))]


def test_a_resumed_run_tells_the_earlier_epochs_again(notebook, tmp_path):
    def stop(entry):
        raise KeyboardInterrupt

    options = {"trackers": ["notebook"], "out": tmp_path, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        train(nn.Linear(2, 2), BATCHES, 2, on_epoch=stop, **options)
    assert notebook.told[-1] == "finish"
    notebook.told.clear()
    train(nn.Linear(2, 2), BATCHES, 2, resume=True, **options)
    assert [told[0] for told in notebook.told[2:-1]] == [1, 2]


def test_trackers_change_no_result(notebook, tmp_path):
    nets = []
    for trackers in ((), ("notebook",)):
        torch.manual_seed(0)
        nets.append(nn.Sequential(nn.Dropout(0.2), nn.Linear(2, 2)))
        train(nets[-1], BATCHES, 2, trackers=trackers, out=tmp_path, **QUIET)
    assert torch.equal(nets[0][1].weight, nets[1][1].weight)


@pytest.mark.parametrize(
    ("trackers", "options", "message"),
    [
        (["tensorbord"], {}, "unknown tracker 'tensorbord': did you mean tensorboard"),
        (["all"], {}, "unknown tracker 'all': known: "),
        ("tensorboard", {}, "trackers='tensorboard' must be a list of names"),
        (["notebook"], {"out": None}, "tracker 'notebook' writes into the run's folder; pass out"),
    ],
)
def test_trackers_that_cannot_start_are_refused_before_anything_changes(notebook, tmp_path, trackers, options, message):
    refused(tmp_path, message, trackers=trackers, **options)


def test_a_missing_package_is_named(tmp_path):
    known, available = accelerate.tracking.LOGGER_TYPE_TO_CLASS, {str(name) for name in get_available_trackers()}
    missing = next((name for name in known if name not in available), None)
    if missing is None:
        pytest.skip("every tracker's package is installed")
    refused(
        tmp_path, f"the package of tracker '{missing}' is not installed; run pip install {missing}", trackers=[missing]
    )


def refused(folder, message, **options):
    net = nn.Linear(2, 2)
    before = net.weight.detach().clone()
    with pytest.raises(OptionError, match=message) as caught:
        train(net, BATCHES, 1, **{"out": folder / "run", **options}, **QUIET)
    assert "\n" not in str(caught.value)
    assert torch.equal(net.weight, before)
    assert list(folder.iterdir()) == []


def test_tensorboard_files_hold_the_figures(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = train(nn.Linear(2, 2), BATCHES, 3, trackers=["tensorboard"], out=tmp_path, **QUIET)
    events = reader.EventAccumulator(str(tmp_path / "widthkit")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(entry["epoch"], pytest.approx(entry["loss"], rel=1e-6)) for entry in result.history]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])["loss"] == result.loss
