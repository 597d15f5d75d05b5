"""Small networks, each declaring by hand which channels belong together; importing this package fills ``CASES``."""

from topologies.borders import PaddedShortcut
from topologies.case import CASES, Case, ConvBN, Net, point, randomised, sites
from topologies.chains import InvertedResidual, PlainChain, Residual
from topologies.joins import DenseBlock, FlattenLinear, GroupedByPosition, Inception, ShuffleUnit
from topologies.positions import CutAtAttribute, TemporalShift
from topologies.sharing import (
    Attention,
    DeadBranch,
    LearnedScale,
    SplitStored,
    TiedWeight,
    Transposed,
    TransposedGrouped,
)

__all__ = [
    "CASES",
    "Attention",
    "Case",
    "ConvBN",
    "CutAtAttribute",
    "DeadBranch",
    "DenseBlock",
    "FlattenLinear",
    "GroupedByPosition",
    "Inception",
    "InvertedResidual",
    "LearnedScale",
    "Net",
    "PaddedShortcut",
    "PlainChain",
    "Residual",
    "ShuffleUnit",
    "SplitStored",
    "TemporalShift",
    "TiedWeight",
    "Transposed",
    "TransposedGrouped",
    "point",
    "randomised",
    "sites",
]
