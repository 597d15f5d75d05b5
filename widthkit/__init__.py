"""widthkit: make any torchvision or timm model slimmer."""

from widthkit.export.dense import export
from widthkit.supernet import Supernet, make_supernet
from widthkit.trace import trace

__all__ = ["Supernet", "export", "make_supernet", "trace"]
