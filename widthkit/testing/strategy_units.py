"""What every strategy must hold to about units: capacities, paths, sub-networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from widthkit.export import dense
from widthkit.supernet.strategy import Strategy
from widthkit.testing.examples import SPACES, build_net, small_batch, some_widths


class UnitTests:
    """The tests of :class:`~widthkit.testing.StrategyConformance` about units."""

    tolerance = 1e-10

    @pytest.mark.parametrize("space", SPACES)
    def test_capacity_covers_the_widest_choice(self, strategy: Strategy, space: str) -> None:
        """A supernet must hold every choice."""
        for choices in build_net(strategy, space).space.groups:
            capacity = strategy.capacity(choices)
            assert isinstance(capacity, int)
            assert capacity >= choices.widest

    @pytest.mark.parametrize("space", SPACES)
    def test_paths_name_distinct_ascending_units_inside_the_capacity(self, strategy: Strategy, space: str) -> None:
        """Of every width between the narrowest and the widest, not only of the choices."""
        for choices in build_net(strategy, space).space.groups:
            for width in range(choices.narrowest, choices.widest + 1):
                paths = strategy.paths(width, choices)
                assert len(paths) >= 1
                for units in paths:
                    assert np.asarray(units).shape == (width,)
                    assert np.issubdtype(np.asarray(units).dtype, np.integer)
                    assert (np.diff(units) > 0).all(), f"width {width}: units {units} are not ascending"
                    assert 0 <= units[0] <= units[-1] < strategy.capacity(choices)

    def test_paths_are_deterministic(self, strategy: Strategy) -> None:
        """The exported units must be the ones that were measured."""
        for choices in build_net(strategy).space.groups:
            for width in choices.options:
                first, second = strategy.paths(width, choices), strategy.paths(width, choices)
                assert [list(a) for a in first] == [list(b) for b in second]

    @pytest.mark.parametrize("space", SPACES)
    def test_every_path_of_a_width_vector_runs(self, strategy: Strategy, space: str) -> None:
        """Also where the space has one choice, shrinks, or grows."""
        net, (inputs, _) = build_net(strategy, space), small_batch()
        for widths in some_widths(net):
            for units in net.paths(widths):
                assert {name: len(u) for name, u in units.items()} == widths
                with torch.no_grad():
                    assert net.run(units, inputs).isfinite().all()

    @pytest.mark.parametrize("space", ["plain", "shrink and grow"])
    def test_a_subnetwork_is_its_exported_network(self, strategy: Strategy, space: str) -> None:
        """In float64, on every path."""
        net, (inputs, _) = build_net(strategy, space).eval(), small_batch()
        for widths in some_widths(net, n=3):
            for path in range(len(net.paths(widths))):
                with torch.no_grad():
                    expected = net.set_widths(widths, path)(inputs)
                    actual = dense.export(net, widths, path=path)(inputs)
                torch.testing.assert_close(actual, expected, rtol=0, atol=self.tolerance)
