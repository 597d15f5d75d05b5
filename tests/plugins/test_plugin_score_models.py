"""The built-in score models: the conformance suite, and each against an independent answer."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize
from scipy.stats import multivariate_normal
from sklearn.linear_model import Ridge
from widthkit_plugins.score_models.log_linear.evidence import Evidence, Layout, Source, constrain
from widthkit_plugins.score_models.log_linear.features import Features
from widthkit_plugins.score_models.log_linear.model import LogLinearModel

from widthkit.search.score_model import Observations
from widthkit.testing import ScoreModelConformance, build_space, small_graph
from widthkit.testing.score_models import draw, planted


class TestLogLinear(ScoreModelConformance):
    @pytest.fixture
    def make_model(self):
        return LogLinearModel


class TestLogLinearWithoutInteractions(ScoreModelConformance):
    @pytest.fixture
    def make_model(self):
        return lambda space: LogLinearModel(space, interactions=False)


@pytest.fixture
def space():
    return build_space("plain", small_graph())


def problem(n=30, m=8, seed=0):
    """Columns, targets and layout of a small problem in two fidelities."""
    rng = np.random.default_rng(seed)
    x, z = rng.standard_normal((n, 6)), rng.standard_normal((m, 3))
    y, r = rng.standard_normal(n), rng.standard_normal(m)
    groups = np.zeros((6, 2))
    groups[[3, 4, 5], [0, 1, 1]] = 1
    return x, y, z, r, Layout(np.array([0, 1, 1, 2, 2, 3]), 3, groups)


THETA = np.array([-1.0, -2.0, -0.5, -3.0, -0.7, -1.5, 0.8, 0.3, -0.4])


def test_at_fixed_variances_the_weights_are_those_of_ridge_regression():
    x, y, _, _, layout = problem()
    layout = Layout(np.zeros(6, dtype=np.int64), 6, np.zeros((6, 0)))
    evidence = Evidence(layout, Source.of(x, y), Source.of(x[:0], y[:0]))
    theta = np.array([np.log(0.3), np.log(0.7), 0.0, 1.0])
    mean, covariance, _ = evidence.posterior(theta)
    ridge = Ridge(alpha=0.7 / 0.3).fit(x, y)
    np.testing.assert_allclose(mean, ridge.coef_, atol=1e-12)
    centred = x - x.mean(0)
    np.testing.assert_allclose(covariance, np.linalg.inv(centred.T @ centred / 0.7 + np.eye(6) / 0.3), atol=1e-12)


def test_the_evidence_is_the_density_of_the_data():
    """Against scipy's multivariate normal, with the intercepts projected out by an orthonormal basis."""
    x, y, z, r, layout = problem()
    evidence = Evidence(layout, Source.of(x, y), Source.of(z, r))

    def density(theta):
        prior = np.diag(np.exp(theta[layout.block] + layout.groups @ theta[7:]))
        scaled = x * np.array([theta[6]] * 3 + [1] * 3)
        wide = np.concatenate([z, np.zeros((len(z), 3))], axis=1)
        both = np.concatenate([scaled, wide])
        noise = np.diag([np.exp(theta[4])] * len(y) + [np.exp(theta[5])] * len(r))
        bases = [np.linalg.qr(np.eye(n) - 1 / n)[0][:, : n - 1] for n in (len(y), len(r))]
        away = np.zeros((len(y) + len(r), len(y) + len(r) - 2))
        away[: len(y), : len(y) - 1], away[len(y) :, len(y) - 1 :] = bases
        covariance = away.T @ (both @ prior @ both.T + noise) @ away
        return multivariate_normal(np.zeros(len(covariance)), covariance).logpdf(away.T @ np.concatenate([y, r]))

    def penalty(theta):
        scale = np.array([2.0] * 6 + [1.0] * 3)
        return 0.5 * float((((theta - evidence.start) / scale) ** 2).sum())

    other = THETA + 0.3
    ours = evidence(THETA)[0] - evidence(other)[0] - penalty(THETA) + penalty(other)
    assert ours == pytest.approx(density(other) - density(THETA), abs=1e-9)


def test_its_gradient_is_the_numerical_one():
    x, y, z, r, layout = problem()
    evidence = Evidence(layout, Source.of(x, y), Source.of(z, r))
    numerical = approx_fprime(THETA, lambda t: evidence(t)[0], 1e-6)
    np.testing.assert_allclose(evidence(THETA)[1], numerical, rtol=1e-4, atol=1e-4)


def test_constrained_weights_are_those_of_a_general_solver():
    rng = np.random.default_rng(3)
    root = rng.standard_normal((4, 4))
    covariance, mean, rows = root @ root.T + np.eye(4), rng.standard_normal(4) - 1, rng.standard_normal((5, 4))
    found = constrain(mean, covariance, rows)
    precision = np.linalg.inv(covariance)
    inequality = {"type": "ineq", "fun": lambda w: rows @ w, "jac": lambda w: rows}
    other = minimize(
        lambda w: (w - mean) @ precision @ (w - mean),
        np.zeros(4),
        jac=lambda w: 2 * precision @ (w - mean),
        constraints=[inequality],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert (rows @ mean < 0).any()
    np.testing.assert_allclose(found, other.x, atol=1e-6)


def test_a_planted_log_linear_truth_is_recovered(space):
    """Slopes 1, 2, 3 per unit of log width; the noise shrinks, so do the errors."""
    widths = draw(space, 400)
    noise = 0.01 * np.random.default_rng(0).standard_normal(len(widths))
    model = LogLinearModel(space)
    model.fit(Observations(widths, planted(space, widths) + noise))
    assert list(model.slopes.values()) == pytest.approx([1.0, 2.0, 3.0], abs=0.02)
    assert model.posterior.noise * planted(space, widths).std() == pytest.approx(0.01, rel=0.2)


def test_curves_that_only_the_supernet_has_are_not_believed(space):
    """Scores bend down at the widest choices; a calibrated model follows the stand-alone trainings."""
    widths, real = draw(space, 300), draw(space, 24, seed=1)
    x = np.log(widths / widths.max(0))
    scores = planted(space, widths) - 4 * (x + 0.7) ** 2 @ np.ones(3)
    model = LogLinearModel(space)
    model.fit(Observations(widths, scores), Observations(real, planted(space, real)))
    test = draw(space, 50, seed=2)
    assert np.corrcoef(model.predict(test).mean, planted(space, test))[0, 1] > 0.99


def test_slopes_are_never_negative(space):
    widths = draw(space, 100)
    log = np.log(widths / widths.max(0))
    model = LogLinearModel(space)
    model.fit(Observations(widths, log @ [1.0, -2.0, 1.5]))
    assert min(model.slopes.values()) >= -1e-9
    assert model.posterior.mean is not model.weights


def test_elasticity_is_the_regression_of_log_macs(space):
    features = Features(space)
    grid = np.stack(np.meshgrid(*[g.options for g in space.groups], indexing="ij"), -1).reshape(-1, len(space.groups))
    x = features.log_widths(grid)
    y = np.log(space.graph.macs(grid))
    slopes = np.linalg.lstsq(np.c_[np.ones(len(x)), x], y, rcond=None)[0][1:]
    np.testing.assert_allclose(features.elasticity, slopes / np.linalg.norm(slopes), atol=0.1)
