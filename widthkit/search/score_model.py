"""What a score model is: it smooths a supernet's noisy scores into a function of the widths, with its uncertainty.

Score models live outside the core and come in through the entry-point group ``widthkit.score_models``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from widthkit.errors import WidthsError
from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace
from widthkit.registry import Registry


@dataclass(frozen=True)
class Observations:
    """Width vectors and what was measured of them.

    Args:
        widths: ``[n, groups]``, in the space's order.
        values: ``[n]``; higher is better. What is not finite is left out.

    >>> Observations(np.array([[4], [8]]), np.array([0.5, np.nan])).widths.tolist()
    [[4]]

    Raises:
        WidthsError: If the two do not fit together.
    """

    widths: IntArray
    values: FloatArray

    def __post_init__(self) -> None:
        widths, values = np.asarray(self.widths, dtype=np.int64), np.asarray(self.values, dtype=np.float64)
        if widths.ndim != 2 or values.shape != widths.shape[:1]:
            raise WidthsError(
                f"observations: widths of shape {widths.shape} and values of shape {values.shape}; "
                "give [n, groups] and [n]"
            )
        finite = np.isfinite(values)
        object.__setattr__(self, "widths", widths[finite])
        object.__setattr__(self, "values", values[finite])

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def none(cls, groups: int) -> Observations:
        """Nothing measured, in a space of that many groups."""
        return cls(np.zeros((0, groups), dtype=np.int64), np.zeros(0))


@dataclass(frozen=True)
class Prediction:
    """What a model expects.

    Args:
        mean: ``[n]``; in units of the calibration where there was one, else of the scores.
        std: ``[n]``; the uncertainty of the mean, without the noise of one measurement.
    """

    mean: FloatArray
    std: FloatArray


class ScoreModel(ABC):
    """Fit scores (and stand-alone accuracies), predict any widths.

    A model draws no random numbers: what it predicts follows from what it was fitted on, so that a resumed search
    goes on identically.

    Args:
        space: The widths that it will be asked about; widths between the choices are fine too.
    """

    monotone: ClassVar[bool] = False
    """Whether the mean never falls when a group gets wider."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space

    @abstractmethod
    def fit(self, scores: Observations, calibration: Observations | None = None) -> None:
        """Learn from measurements, forgetting earlier ones.

        Args:
            scores: What the supernet gave, in any unit. May be empty if there is a calibration.
            calibration: What stand-alone trainings gave, in their own unit and with their own noise.

        Raises:
            ModelError: If there is nothing finite to learn from.
        """

    @abstractmethod
    def predict(self, widths: IntArray) -> Prediction:
        """Predict width vectors ``[n, groups]``.

        Raises:
            ModelError: If the model was not fitted.
        """


SCORE_MODELS: Registry[type[ScoreModel]] = Registry("score model", "widthkit.score_models", ScoreModel)
register = SCORE_MODELS.register
