"""A Gaussian process over the log widths as score model, by scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from widthkit.errors import ModelError, OptionError
from widthkit.graph import IntArray
from widthkit.graph.space import SearchSpace
from widthkit.search.score_model import FloatArray, Observations, Prediction, ScoreModel


class GaussianProcessModel(ScoreModel):
    """Gaussian process over log widths: a linear and a smooth part, noise and length by marginal likelihood.

    Calibrations are added as in Kennedy and O'Hagan (Biometrika 2000, Eq. 1): accuracy is the scores' process times a
    factor, plus a second process. Believes every smooth trend of the scores, also those that only the supernet has, and
    is not monotone.

    Args:
        space: The widths to predict.
        max_points: Fit on at most this many scores, drawn with a fixed seed: time grows with the cube.
    """

    def __init__(self, space: SearchSpace, max_points: int = 256) -> None:
        super().__init__(space)
        if max_points < 2:
            raise OptionError(f"max_points={max_points}: a Gaussian process needs at least 2")
        self.max_points = max_points
        self._widest = np.array([g.widest for g in space.groups], dtype=np.float64)
        self._scores: _Process | None = None
        self._shift: _Process | None = None
        self._rho = 1.0
        self._fitted = False

    def fit(self, scores: Observations, calibration: Observations | None = None) -> None:
        """Fit the scores' process, then the factor by least squares, then the process of what is left."""
        if not len(scores) and not (calibration is not None and len(calibration)):
            raise ModelError("a score model needs at least one finite score or calibration")
        self._scores = self._shift = None
        self._rho = 1.0
        if len(scores):
            # A fixed draw: evenly spaced places would alias with the order in which a grid is listed.
            order = np.random.default_rng(0).permutation(len(scores))
            kept = np.sort(order[: self.max_points])
            self._scores = _Process(self._inputs(scores.widths[kept]), scores.values[kept])
        # Two calibrations are the fewest that fix a unit; with less, predictions are in units of the scores.
        if calibration is not None and (len(calibration) >= 2 or self._scores is None):
            self._correct(calibration)
        self._fitted = True

    def predict(self, widths: IntArray) -> Prediction:
        """Mean and standard deviation of the process, without noise."""
        if not self._fitted:
            raise ModelError("the score model was not fitted; call fit first")
        x = self._inputs(widths)
        mean, variance = np.zeros(len(x)), np.zeros(len(x))
        for factor, process in ((self._rho, self._scores), (1.0, self._shift)):
            if process is not None:
                m, s = process.predict(x)
                mean, variance = mean + factor * m, variance + (factor * s) ** 2
        return Prediction(mean, np.sqrt(variance))

    def _correct(self, calibration: Observations) -> None:
        x, y = self._inputs(calibration.widths), calibration.values
        if self._scores is not None:
            cheap = self._scores.predict(x)[0]
            spread = cheap - cheap.mean()
            if spread @ spread > 0:
                self._rho = max(float(spread @ (y - y.mean()) / (spread @ spread)), 0.0)
            y = y - self._rho * cheap
        self._shift = _Process(x, y)

    def _inputs(self, widths: IntArray) -> FloatArray:
        return np.asarray(np.log(np.asarray(widths, dtype=np.float64) / self._widest))


class _Process:
    """One process over standardised targets."""

    def __init__(self, x: FloatArray, y: FloatArray) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

        wide = (1e-4, 1e4)
        kernel: Any = ConstantKernel(0.1, wide) * DotProduct(1.0, "fixed")
        kernel += ConstantKernel(0.1, wide) * RBF(np.ones(x.shape[1]), (0.05, 100.0))
        kernel += WhiteKernel(0.1, (1e-5, 10.0))
        self.mean, deviation = float(y.mean()), float(y.std())
        self.deviation = deviation if deviation > 0 else 1.0
        self._regressor = GaussianProcessRegressor(kernel, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a variance at its bound is an answer, too
            self._regressor.fit(x, (y - self.mean) / self.deviation)
        fitted = self._regressor.kernel_
        self._noise = float(fitted.k2.noise_level)

    def predict(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation ``[n]`` of the noise-free process."""
        mean, std = self._regressor.predict(x, return_std=True)
        latent = np.sqrt(np.maximum(std**2 - self._noise, 0.0))
        return self.mean + self.deviation * mean, self.deviation * latent
