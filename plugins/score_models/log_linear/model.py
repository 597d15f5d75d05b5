"""The log-linear score model: accuracy rises in proportion to the log of every width."""

from __future__ import annotations

import numpy as np
from widthkit_plugins.score_models.log_linear.evidence import Evidence, Layout, Posterior, Source, constrain
from widthkit_plugins.score_models.log_linear.features import Features

from widthkit.errors import ModelError
from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace
from widthkit.search.score_model import Observations, Prediction, ScoreModel


class LogLinearModel(ScoreModel):
    """Log-linear in every width, slopes shrunk towards one another and never negative.

    A supernet misjudges widths in ways that more evaluations do not cure: its curves over a layer's width bend, and
    layers interact, where stand-alone networks hardly do. So its scores are split into a part that is linear in the log
    widths, which is trusted, and curves and interactions, which are taken for the supernet's own. How large those are
    says how far its slopes can be off; the slopes shrink that much towards a common slope and one in proportion to the
    MACs elasticity. All variances come from the marginal likelihood. Calibrations see the trusted part alone.

    Args:
        space: The widths to predict.
        interactions: Expect interactions of two groups among the supernet's errors.
    """

    monotone = True

    def __init__(self, space: SearchSpace, interactions: bool = True) -> None:
        super().__init__(space)
        self.features = Features(space)
        self.interactions = interactions
        self.posterior: Posterior | None = None

    def fit(self, scores: Observations, calibration: Observations | None = None) -> None:
        """Estimate variances, then weights, then the weights inside the constraints."""
        real = calibration if calibration is not None else Observations.none(len(self.space.groups))
        if not len(scores) and not len(real):
            raise ModelError("a score model needs at least one finite score or calibration")
        cheap, true = _Scaled(scores.values), _Scaled(real.values)
        trusted = self.features.trusted(scores.widths)
        columns = np.concatenate([trusted, *self._errors(scores.widths)], axis=1)
        real_columns = self.features.trusted(real.widths)
        evidence = Evidence(self._layout(), Source.of(columns, cheap.values), Source.of(real_columns, true.values))
        self.posterior = evidence.maximise()
        k = trusted.shape[1]
        self._covariance = self.posterior.covariance[:k, :k]
        rows = np.concatenate([self.features.slopes, np.zeros((self.features.n_groups, columns.shape[1] - k))], axis=1)
        self.weights = constrain(self.posterior.mean, self.posterior.covariance, rows)[:k]
        # Two calibrations are the fewest that fix a unit; with less, predictions are in units of the scores.
        calibrated = len(real) >= 2 or not len(scores)
        self._unit, noise = (true, self.posterior.calibration_noise) if calibrated else (cheap, self.posterior.noise)
        seen = real_columns if calibrated else trusted
        self._centre = seen.mean(0)
        self._intercept_variance = noise**2 / len(seen)

    def predict(self, widths: IntArray) -> Prediction:
        """Mean and standard deviation of the trusted part."""
        if self.posterior is None:
            raise ModelError("the score model was not fitted; call fit first")
        x = self.features.trusted(widths) - self._centre
        variance = ((x @ self._covariance) * x).sum(1) + self._intercept_variance
        unit = self._unit
        return Prediction(unit.mean + unit.std * (x @ self.weights), unit.std * np.sqrt(variance))

    @property
    def slopes(self) -> dict[str, float]:
        """Gain per unit of log width of every group that has a choice, in units of the prediction."""
        if self.posterior is None:
            raise ModelError("the score model was not fitted; call fit first")
        steps = self.features.slopes @ self.weights * self._unit.std * self.features.per_log
        return {self.space.names[i]: float(s) for i, s in zip(self.features.free, steps, strict=True)}

    def _errors(self, widths: IntArray) -> tuple[FloatArray, ...]:
        curves, products = self.features.errors(widths)
        return (curves, products) if self.interactions else (curves,)

    def _layout(self) -> Layout:
        n = self.features.n_groups
        curves, products = self.features.membership
        parts = [np.zeros((1, n)), np.zeros((1, n)), np.zeros((n, n)), curves]
        parts += [products] if self.interactions else []
        sizes = [len(part) for part in parts]
        return Layout(np.repeat(np.arange(len(sizes)), sizes), n + 2, np.concatenate(parts))


class _Scaled:
    """Targets with mean 0 and variance 1, and the way back."""

    def __init__(self, values: FloatArray) -> None:
        self.mean = float(values.mean()) if len(values) else 0.0
        deviation = float(values.std()) if len(values) else 0.0
        self.std = deviation if deviation > 0 else 1.0
        self.values = (values - self.mean) / self.std
