"""Soft targets and attention maps against closed forms in NumPy."""

import numpy as np
import pytest
import torch

from widthkit.errors import ModelError
from widthkit.train.distillation import (
    attention_loss,
    attention_map,
    check_soft_targets,
    matching_places,
    soft_target_loss,
)


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3, 2)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets_are_the_closed_form(shape, temperature):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=shape), rng.normal(size=shape)
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    positions = student.size // shape[1]
    truth = temperature**2 * (p * np.log(p / q)).sum() / positions
    s, t = torch.tensor(student, requires_grad=True), torch.tensor(teacher, requires_grad=True)
    loss = soft_target_loss(s, {"out": t}, temperature)
    assert loss.item() == pytest.approx(truth, abs=1e-12)
    loss.backward()
    assert t.grad is None
    np.testing.assert_allclose(s.grad.numpy(), temperature * (q - p) / positions, atol=1e-12)


def test_the_divergence_from_oneself_is_zero_and_so_is_its_gradient():
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = soft_target_loss(logits, logits.detach(), 3.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert logits.grad.abs().max() < 1e-15


@pytest.mark.parametrize(
    ("student", "teacher", "text"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), r"not \(2, 3\) of the network and \(2, 4\) of the teacher"),
        (torch.zeros(2, 1), torch.zeros(2, 1), "at least two classes"),
        (torch.zeros(2), torch.zeros(2), "at least two classes"),
        ([], torch.zeros(2, 3), "none in outputs of the network of type list"),
        (torch.zeros(2, 3), {"boxes": torch.zeros(2, 4)}, "none in outputs of the teacher of type dict"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3), "none in outputs of the network"),
    ],
)
def test_what_has_no_soft_targets_is_refused(student, teacher, text):
    with pytest.raises(ModelError, match=text) as caught:
        soft_target_loss(student, teacher, 1.0)
    assert "\n" not in str(caught.value)
    assert "teacher_weight=0" in str(caught.value)


def test_targets_of_a_regression_are_refused():
    logits = torch.zeros(2, 3)
    for targets in (torch.tensor([0, 1]), torch.eye(3)[:2] * 0.9 + 0.1 / 3, None, {"labels": torch.zeros(2)}):
        check_soft_targets(logits, logits, targets)
    for targets in (torch.zeros(2), torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4)):
        with pytest.raises(ModelError, match="the targets are other numbers"):
            check_soft_targets(logits, logits, targets)


def test_attention_is_the_closed_form_for_any_number_of_channels():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 3, 4)), rng.normal(size=(2, 7, 3, 4))

    def attention(x):
        q = (x**2).sum(1).reshape(2, 12)
        return q / np.sqrt((q**2).sum(1, keepdims=True))

    ours, theirs = (attention_map(torch.tensor(x)) for x in (student, teacher))
    np.testing.assert_allclose(ours.numpy(), attention(student), atol=1e-14)
    truth = 0.5 * ((attention(student) - attention(teacher)) ** 2).mean()
    assert attention_loss(ours, theirs).item() == pytest.approx(truth, abs=1e-14)


def test_large_half_precision_features_do_not_overflow():
    features = torch.full((1, 8, 2, 2), 300.0, dtype=torch.float16)
    torch.testing.assert_close(attention_map(features), torch.full((1, 4), 0.5))


def test_features_of_zero_have_a_finite_gradient():
    features = torch.zeros(1, 2, 2, 2, requires_grad=True)
    attention_loss(attention_map(features), torch.full((1, 4), 0.5)).backward()
    assert features.grad.isfinite().all()


def test_the_last_place_of_every_size_is_chosen():
    student = {
        "stem": (8, 4, 16, 16),
        "only here": (8, 4, 16, 16),
        "one": (8, 6, 8, 8),
        "two": (8, 6, 8, 8),
        "other size": (8, 6, 4, 4),
        "tokens": (8, 16, 6),
        "between tokens": (8, 6, 64, 64),
        "pool": (8, 6, 1, 1),
        "head": (8, 10),
    }
    teacher = {name: (shape[0], 9, *shape[2:]) for name, shape in student.items() if name != "only here"}
    teacher["other size"] = (8, 6, 5, 4)
    sizes = [(16, 16), (8, 8), (4, 4), (5, 4), (1, 1)]
    assert matching_places(student, teacher, sizes) == ["stem", "two"]
    assert matching_places(student, {}, sizes) == []
