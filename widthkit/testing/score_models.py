"""What every score model must hold to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from widthkit.errors import ModelError
from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace
from widthkit.search.score_model import Observations, Prediction, ScoreModel
from widthkit.testing.examples import SPACES, build_space, small_graph

MakeScoreModel = Callable[[SearchSpace], ScoreModel]


def draw(space: SearchSpace, n: int, seed: int = 0) -> IntArray:
    """Return ``[n, groups]``: random width vectors of a space."""
    rng = np.random.default_rng(seed)
    return np.array([list(space.sample(rng).values()) for _ in range(n)], dtype=np.int64)


def planted(space: SearchSpace, widths: IntArray) -> FloatArray:
    """Return ``[n]``: a truth that is linear in the log widths, steeper for later groups."""
    widest = np.array([g.widest for g in space.groups], dtype=np.float64)
    return np.asarray(np.log(widths / widest) @ (1.0 + np.arange(len(widest))))


class ScoreModelConformance:
    """Subclass this, name the class ``Test...``, and give it a fixture ``make_model``.

    The fixture returns a callable ``space -> ScoreModel``; a class whose options all have defaults is one already.

    >>> class TestDefault(ScoreModelConformance):
    ...     @pytest.fixture
    ...     def make_model(self):
    ...         return SCORE_MODELS.get(SCORE_MODELS.default)
    """

    @pytest.fixture
    def make_model(self) -> MakeScoreModel:
        """Return a callable that builds the model under test; every subclass overrides this."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture 'make_model'")

    def _fit(
        self, make: MakeScoreModel, name: str = "plain", noise: float = 0.05, calibrate: int = 0
    ) -> tuple[ScoreModel, SearchSpace]:
        space = build_space(name, small_graph())
        rng = np.random.default_rng(7)
        widths, real = draw(space, 40), draw(space, calibrate, seed=1) if calibrate else None
        model = make(space)
        scores = Observations(widths, planted(space, widths) + noise * rng.standard_normal(len(widths)))
        model.fit(scores, Observations(real, 10 + 5 * planted(space, real)) if real is not None else None)
        return model, space

    # --- what it predicts ---------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", SPACES)
    @pytest.mark.parametrize("calibrate", [0, 8])
    def test_predictions_are_finite_on_every_kind_of_space(
        self, make_model: MakeScoreModel, name: str, calibrate: int
    ) -> None:
        """Mean and uncertainty for every vector, the narrowest, the widest and what lies between choices included."""
        model, space = self._fit(make_model, name, calibrate=calibrate)
        low, high = (np.array([list(w.values())]) for w in (space.smallest, space.largest))
        widths = np.concatenate([draw(space, 5, seed=2), low, high, (low + high + 1) // 2])
        found = model.predict(widths)
        assert isinstance(found, Prediction)
        assert found.mean.shape == found.std.shape == (len(widths),)
        assert np.isfinite(found.mean).all()
        assert np.isfinite(found.std).all()
        assert (found.std >= 0).all()

    def test_a_planted_order_is_found(self, make_model: MakeScoreModel) -> None:
        """A truth that is linear in the log widths, with little noise, is ranked nearly right."""
        model, space = self._fit(make_model)
        widths = draw(space, 60, seed=3)
        assert np.corrcoef(model.predict(widths).mean, planted(space, widths))[0, 1] > 0.95

    def test_calibration_gives_the_unit(self, make_model: MakeScoreModel) -> None:
        """Predictions are in units of the stand-alone accuracies, close to them."""
        model, space = self._fit(make_model, calibrate=16)
        widths = draw(space, 60, seed=3)
        truth = 10 + 5 * planted(space, widths)
        assert np.sqrt(np.mean((model.predict(widths).mean - truth) ** 2)) < 0.25 * truth.std()

    def test_calibration_alone_is_enough(self, make_model: MakeScoreModel) -> None:
        """No score of a supernet is needed."""
        space = build_space("plain", small_graph())
        widths = draw(space, 16)
        model = make_model(space)
        model.fit(Observations.none(len(space.groups)), Observations(widths, planted(space, widths)))
        test = draw(space, 60, seed=3)
        assert np.corrcoef(model.predict(test).mean, planted(space, test))[0, 1] > 0.9

    def test_more_measurements_make_it_surer(self, make_model: MakeScoreModel) -> None:
        """Uncertainty falls, on average, with the number of calibrations."""
        stds = []
        for n in (6, 60):
            space = build_space("plain", small_graph())
            widths = draw(space, n)
            noise = 0.3 * np.random.default_rng(1).standard_normal(n)
            model = make_model(space)
            model.fit(Observations.none(len(space.groups)), Observations(widths, planted(space, widths) + noise))
            stds.append(float(model.predict(draw(space, 40, seed=4)).std.mean()))
        assert stds[1] < stds[0]

    def test_a_model_that_says_so_is_monotone(self, make_model: MakeScoreModel) -> None:
        """On scores that fall with the width, too: widening one group never lowers the mean."""
        space = build_space("plain", small_graph())
        widths = draw(space, 40)
        model = make_model(space)
        model.fit(Observations(widths, -planted(space, widths)))
        if not model.monotone:
            return
        for g, choices in enumerate(space.groups):
            for base in draw(space, 5, seed=5):
                line = np.repeat(base[None], len(choices.options), axis=0)
                line[:, g] = choices.options
                assert (np.diff(model.predict(line).mean) >= -1e-9).all()

    # --- what it may be given -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_few_scores_are_enough(self, make_model: MakeScoreModel, n: int) -> None:
        """Even one."""
        space = build_space("plain", small_graph())
        widths = draw(space, n)
        model = make_model(space)
        model.fit(Observations(widths, planted(space, widths)))
        assert np.isfinite(model.predict(widths).mean).all()

    def test_equal_scores_are_no_trouble(self, make_model: MakeScoreModel) -> None:
        """A supernet that learned nothing gives every network the same."""
        space = build_space("plain", small_graph())
        model = make_model(space)
        model.fit(Observations(draw(space, 10), np.full(10, 0.25)))
        found = model.predict(draw(space, 10, seed=1))
        np.testing.assert_allclose(found.mean, 0.25, atol=1e-6)

    def test_nothing_to_learn_from_is_refused(self, make_model: MakeScoreModel) -> None:
        """Nothing at all, and nothing but NaN; also predicting before fitting."""
        space = build_space("plain", small_graph())
        with pytest.raises(ModelError):
            make_model(space).predict(draw(space, 1))
        for scores in (Observations.none(len(space.groups)), Observations(draw(space, 3), np.full(3, np.nan))):
            with pytest.raises(ModelError):
                make_model(space).fit(scores)

    # --- repeatability ------------------------------------------------------------------------------------------------

    def test_predictions_follow_from_the_measurements(self, make_model: MakeScoreModel) -> None:
        """Two models agree to the last bit, nothing is drawn from a global generator, and fitting again forgets."""
        states = torch.get_rng_state(), str(np.random.get_state())
        first, space = self._fit(make_model, calibrate=8)
        second, _ = self._fit(make_model, calibrate=8)
        widths = draw(space, 10, seed=6)
        expected = second.predict(widths)
        other = draw(space, 12, seed=8)
        first.fit(Observations(other, -planted(space, other)))
        rng = np.random.default_rng(7)
        again, real = draw(space, 40), draw(space, 8, seed=1)
        scores = Observations(again, planted(space, again) + 0.05 * rng.standard_normal(40))
        first.fit(scores, Observations(real, 10 + 5 * planted(space, real)))
        found = first.predict(widths)
        assert np.array_equal(found.mean, expected.mean)
        assert np.array_equal(found.std, expected.std)
        assert torch.equal(torch.get_rng_state(), states[0]), "a score model draws no random numbers"
        assert str(np.random.get_state()) == states[1], "a score model draws no random numbers"
