"""Bayesian linear regression in two fidelities; all variances by marginal likelihood.

Scores are ``rho * f + errors + noise``, calibrations ``f + noise``; ``f`` and the errors are linear in their columns,
with zero-mean Gaussian weights whose variances are shared by block. It is Kennedy and O'Hagan's model (Biometrika 2000)
the other way around: here the cheap source has the systematic error. The noise of both is estimated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve, cholesky
from scipy.optimize import minimize, nnls

from widthkit.graph import FloatArray, IntArray

_WIDE = 2.0
"""Standard deviation of the priors on log variances: two units say that a factor of 50 either way is no surprise."""
_SIGNAL, _NOISE = np.log(0.1), np.log(0.3)
"""Their means; targets have variance 1."""


@dataclass(frozen=True)
class Source:
    """Sums over one set of measurements: all that the fit needs of it.

    Args:
        gram: ``[p, p]``; products of the centred columns.
        moment: ``[p]``; products of columns and centred targets.
        square: Sum of squared targets.
        freedom: Measurements less one, for the intercept.
    """

    gram: FloatArray
    moment: FloatArray
    square: float
    freedom: int

    @classmethod
    def of(cls, columns: FloatArray, targets: FloatArray) -> Source:
        """Centre and sum up ``[n, p]`` columns and ``[n]`` targets."""
        if not len(targets):
            return cls(columns.T @ columns, columns.T @ targets, 0.0, 0)
        x, y = columns - columns.mean(0), targets - targets.mean()
        return cls(x.T @ x, x.T @ y, float(y @ y), len(y) - 1)


@dataclass(frozen=True)
class Layout:
    """How columns share variances.

    Args:
        block: ``[p]``; index of the variance that each weight has.
        trusted: How many of the first columns belong to ``f``.
        groups: ``[p, groups]``; log variances of weights are shifted by their groups' log scales.
    """

    block: IntArray
    trusted: int
    groups: FloatArray

    @property
    def n_blocks(self) -> int:
        """How many variances there are."""
        return int(self.block.max(initial=-1)) + 1


@dataclass(frozen=True)
class Posterior:
    """Weights and their covariance at the likeliest variances.

    Args:
        mean: ``[p]``.
        covariance: ``[p, p]``.
        deviations: ``[blocks]``; prior standard deviations of the weights.
        noise: Standard deviation of one score.
        calibration_noise: Standard deviation of one calibration.
        evidence: Log marginal likelihood plus the log priors of the variances, up to a constant.
    """

    mean: FloatArray
    covariance: FloatArray
    deviations: FloatArray
    noise: float
    calibration_noise: float
    evidence: float


class Evidence:
    """Negative log evidence and its gradient, by Fisher's identity.

    Parameters, in order: log variances of the blocks, of the scores' noise, of the calibrations' noise; rho; log scales
    of the groups.

    Args:
        layout: How columns share variances.
        scores: The cheap source.
        calibration: The true one; without measurements rho stays at 1.
    """

    def __init__(self, layout: Layout, scores: Source, calibration: Source) -> None:
        self.layout, self.scores, self.calibration = layout, scores, calibration
        n, groups = layout.n_blocks, layout.groups.shape[1]
        both = bool(len(calibration.moment)) and calibration.freedom > 0 and scores.freedom > 0
        self.start = np.concatenate([np.full(n, _SIGNAL), [_NOISE, _NOISE, 1.0], np.zeros(groups)])
        self._deviation = np.concatenate([np.full(n, _WIDE), [_WIDE, _WIDE, 1.0], np.ones(groups)])
        fixed = [(1.0, 1.0)] if not both else [(0.0, 10.0)]
        self.bounds = [(-16.0, 8.0)] * (n + 2) + fixed + [(-6.0, 6.0)] * groups

    def maximise(self) -> Posterior:
        """Find the likeliest variances and the posterior of the weights there."""
        found = minimize(self, self.start, jac=True, method="L-BFGS-B", bounds=self.bounds, options={"maxiter": 200})
        n = self.layout.n_blocks
        mean, covariance, _ = self.posterior(found.x)
        deviations = np.exp(found.x[: n + 2] / 2)
        return Posterior(
            mean,
            covariance,
            deviations[:n],
            float(deviations[n]),
            float(deviations[n + 1]),
            -float(found.fun),
        )

    def posterior(self, theta: FloatArray) -> tuple[FloatArray, FloatArray, float]:
        """Return mean ``[p]``, covariance ``[p, p]`` and log determinant of the precision, given the parameters."""
        n, k = self.layout.n_blocks, self.layout.trusted
        scale = self._scale(theta)
        noise, other = np.exp(-theta[n]), np.exp(-theta[n + 1])
        precision = noise * self.scores.gram * scale[:, None] * scale + np.diag(self._precision(theta))
        target = noise * self.scores.moment * scale
        precision[:k, :k] += other * self.calibration.gram
        target[:k] += other * self.calibration.moment
        factor = cholesky(precision, lower=True)
        covariance = cho_solve((factor, True), np.eye(len(target)))
        return covariance @ target, covariance, 2 * float(np.log(np.diag(factor)).sum())

    def __call__(self, theta: FloatArray) -> tuple[float, FloatArray]:
        """Return the negative log evidence and its gradient."""
        n, k = self.layout.n_blocks, self.layout.trusted
        mean, covariance, log_determinant = self.posterior(theta)
        scale, precision = self._scale(theta), self._precision(theta)
        second = np.outer(mean, mean) + covariance
        noise, other = np.exp(-theta[n]), np.exp(-theta[n + 1])
        s, c = self.scores, self.calibration
        fitted = noise * (s.moment * scale) @ mean + other * c.moment @ mean[:k]
        away = (theta - self.start) / self._deviation
        value = 0.5 * (log_determinant - np.log(precision).sum() + s.freedom * theta[n] + c.freedom * theta[n + 1])
        value += 0.5 * (noise * s.square + other * c.square - fitted + away @ away)
        gradient = away / self._deviation
        excess = -0.5 * (np.diag(second) * precision - 1)
        np.add.at(gradient, self.layout.block, excess)
        gradient[n + 3 :] += excess @ self.layout.groups
        scaled = s.gram * second * scale
        left = s.square - 2 * (s.moment * scale) @ mean + scale @ scaled.sum(1)
        gradient[n] += 0.5 * (s.freedom - noise * left)
        left = c.square - 2 * c.moment @ mean[:k] + (c.gram * second[:k, :k]).sum()
        gradient[n + 1] += 0.5 * (c.freedom - other * left)
        gradient[n + 2] -= noise * (s.moment[:k] @ mean[:k] - scaled[:k].sum())
        return float(value), gradient

    def _scale(self, theta: FloatArray) -> FloatArray:
        scale = np.ones(len(self.layout.block))
        scale[: self.layout.trusted] = theta[self.layout.n_blocks + 2]
        return scale

    def _precision(self, theta: FloatArray) -> FloatArray:
        shift = self.layout.groups @ theta[self.layout.n_blocks + 3 :]
        return np.asarray(np.exp(-theta[self.layout.block] - shift))


def constrain(mean: FloatArray, covariance: FloatArray, rows: FloatArray) -> FloatArray:
    """Return the likeliest weights with ``rows @ weights >= 0``: ``[p]``.

    The dual of this quadratic program is a non-negative least squares problem with one variable per row.

    >>> np.abs(constrain(np.array([1.0, -2.0]), np.eye(2), np.eye(2))).round(6).tolist()
    [1.0, 0.0]
    """
    if not len(rows) or (rows @ mean >= 0).all():
        return mean
    inner = rows @ covariance @ rows.T
    scale = float(np.trace(inner)) / len(inner)
    factor = cholesky(inner / scale + 1e-12 * np.eye(len(inner)), lower=True)
    forces, _ = nnls(factor.T, -np.linalg.solve(factor, rows @ mean) / scale, maxiter=100 * len(inner))
    return np.asarray(mean + covariance @ rows.T @ forces)
