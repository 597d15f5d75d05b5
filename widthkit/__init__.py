"""widthkit: make any torchvision or timm model slimmer."""

from widthkit.errors import WidthkitError
from widthkit.export.backbone import backbone
from widthkit.export.dense import export
from widthkit.export.save import save
from widthkit.export.slim_file import load
from widthkit.modules.models import create_model
from widthkit.run.recipe import recipe, recipes
from widthkit.search.run import search
from widthkit.supernet import Supernet, make_supernet
from widthkit.supernet.strategy import Strategy
from widthkit.trace import trace
from widthkit.train import load_data, make_loader, recalibrate, train
from widthkit.version import __version__

__all__ = [
    "Strategy",
    "Supernet",
    "WidthkitError",
    "__version__",
    "backbone",
    "create_model",
    "export",
    "load",
    "load_data",
    "make_loader",
    "make_supernet",
    "recalibrate",
    "recipe",
    "recipes",
    "save",
    "search",
    "trace",
    "train",
]
