"""Cardinalities of the picture against the papers' closed forms."""

import numpy as np
from widthkit_plugins.strategies.bc import BilaterallyCoupled
from widthkit_plugins.strategies.bcv2 import BilaterallyCoupledV2
from widthkit_plugins.strategies.ua import UniversallyAligned

from widthkit.report.cardinality import count_cardinality, draw_cardinality

WIDTH, BASE = 6, 2
CHANNELS = np.arange(1, WIDTH + 1)


def count(strategy, min_width=1):
    """Count over one cycle of widths: these strategies draw nothing else at random."""
    return count_cardinality(strategy, WIDTH, min_width, min_steps=1)


def test_ua():
    found = count(UniversallyAligned(n_random=1))
    assert found.judged.tolist() == [(WIDTH - CHANNELS + 1).tolist()]
    # The largest network, the smallest, and one of every width in turn.
    np.testing.assert_allclose(found.trained, 1 + (CHANNELS == 1) + (WIDTH - CHANNELS + 1) / WIDTH)


def test_bc():
    found = count(BilaterallyCoupled(complement="paper"))
    assert found.judged.sum(0).tolist() == [WIDTH + 1] * WIDTH
    # Two per step, four where the full width is its own complement.
    np.testing.assert_allclose(found.trained, [(2 * (WIDTH - 1) + 4) / WIDTH] * WIDTH)


def test_bc_with_complements_inside_the_space_trains_as_it_judges():
    # Every width is drawn as often as it is a complement, so training follows Eq. 9 where all widths are choices.
    found = count(BilaterallyCoupled())
    np.testing.assert_allclose(found.trained, [2 * (WIDTH + 1) / WIDTH] * WIDTH)
    uneven = count(BilaterallyCoupled(), BASE)
    np.testing.assert_allclose(uneven.trained / uneven.trained[0], uneven.judged.sum(0) / uneven.judged.sum(0)[0])


def test_bc_from_a_base_width_up_is_uneven():
    # BCNetV2, Eq. 19: with base width l_s both ends always hold it, whatever the width; the ends are used less.
    judged = count(BilaterallyCoupled(), BASE).judged.sum(0)
    expected = [sum(int(c <= w) + int(c > WIDTH - w) for w in range(BASE, WIDTH + 1)) for c in CHANNELS]
    assert judged.tolist() == expected
    assert len(set(expected)) > 1


def test_bcv2_is_even_with_the_exact_layout_only():
    # Eq. 21: l - l_s + 2 sub-networks... of l + l_s channels, each end with a base of its own.
    found = count(BilaterallyCoupledV2(), BASE)
    assert len(found.trained) == WIDTH + BASE
    assert len(set(found.judged.sum(0).tolist())) == 1
    np.testing.assert_allclose(found.trained, found.trained[0])
    assert len(set(count(BilaterallyCoupledV2("text"), BASE).judged.sum(0).tolist())) == 2


def test_the_picture_is_a_png(tmp_path):
    strategies = {"ua": UniversallyAligned(n_random=0), "bcv2": BilaterallyCoupledV2()}
    draw_cardinality(strategies, tmp_path / "deep" / "a.png", width=3, base=2)
    assert (tmp_path / "deep" / "a.png").read_bytes().startswith(b"\x89PNG")
