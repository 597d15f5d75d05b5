"""Training: the engine, data sets, losses, batch-norm calibration, checkpoints."""

from widthkit.train.calibrate import batch_statistics, recalibrate
from widthkit.train.data import DataSplits, load_data, make_loader
from widthkit.train.engine import train
from widthkit.train.evaluation import evaluate
from widthkit.train.result import TrainResult
from widthkit.train.settings import TrainSettings
from widthkit.train.step import StepContext

__all__ = [
    "DataSplits",
    "StepContext",
    "TrainResult",
    "TrainSettings",
    "batch_statistics",
    "evaluate",
    "load_data",
    "make_loader",
    "recalibrate",
    "train",
]
