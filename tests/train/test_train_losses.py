from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from widthkit.errors import DataError, ModelError, OptionError
from widthkit.train.losses import accuracy, binding, cross_entropy, main_output, soft_cross_entropy


def log_softmax(x):
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_closed_form(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 5)), rng.integers(0, 5, 6)
    target = np.full((6, 5), smoothing / 5)
    target[np.arange(6), labels] += 1 - smoothing
    truth = -(target * log_softmax(logits)).sum(1).mean()
    loss = cross_entropy(smoothing)(torch.tensor(logits), torch.tensor(labels))
    # The criterion computes in single precision.
    assert float(loss) == pytest.approx(truth, abs=1e-6)


def test_soft_cross_entropy_is_the_closed_form_and_its_least_value_is_the_entropy():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 4, 3))
    truth = -(np.exp(log_softmax(teacher)) * log_softmax(student)).sum(1).mean()
    s, t = torch.tensor(student, requires_grad=True), torch.tensor(teacher, requires_grad=True)
    loss = soft_cross_entropy(s, t)
    assert loss.item() == pytest.approx(truth, abs=1e-6)
    loss.backward()
    assert t.grad is None
    # d/ds = (softmax(s) - softmax(t)) / N
    expected = (np.exp(log_softmax(student)) - np.exp(log_softmax(teacher))) / 4
    np.testing.assert_allclose(s.grad.numpy(), expected, atol=1e-6)


def test_half_precision_logits_do_not_lose_the_loss():
    logits = torch.tensor([[40.0, 0.0]], dtype=torch.bfloat16)
    assert float(soft_cross_entropy(logits, logits)) >= 0
    assert cross_entropy()(logits, torch.tensor([1])).dtype == torch.float32


def test_logits_are_found_where_models_put_them():
    logits = torch.eye(3)
    targets = torch.arange(3)
    for outputs in (
        logits,
        (logits, None),
        [logits],
        {"out": logits},
        {"logits": logits},
        SimpleNamespace(logits=logits),
    ):
        assert main_output(outputs) is logits
        assert accuracy(outputs, targets) == 1.0
    with pytest.raises(ModelError, match="cannot find logits"):
        main_output({"boxes": logits})


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.zeros(2)),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
        ("text", torch.zeros(2)),
        (torch.zeros(2, 3), None),
    ],
)
def test_no_accuracy_without_class_logits(outputs, targets):
    assert accuracy(outputs, targets) is None


def test_refusals():
    with pytest.raises(OptionError, match="label smoothing"):
        cross_entropy(1.0)
    with pytest.raises(DataError, match="label 7 does not fit the model's 3 classes"):
        cross_entropy()(torch.zeros(2, 3), torch.tensor([0, 7]))
    with pytest.raises(DataError, match="label -1"):
        cross_entropy()(torch.zeros(2, 3), torch.tensor([0, -1]))
    with pytest.raises(ModelError, match="needs logits"):
        cross_entropy()(torch.zeros(2), torch.tensor([0, 1]))
    with pytest.raises(ModelError, match="one shape"):
        soft_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 4))


# --- losses that take the inputs --------------------------------------------------------------------------------------


def third(outputs, targets, inputs):
    return inputs


def by_keyword(outputs, targets, *, inputs=None):
    return inputs


class Called:
    def __call__(self, outputs, targets, inputs):
        return inputs


class Module(nn.Module):
    def forward(self, outputs, targets, inputs=None):
        return inputs


@pytest.mark.parametrize(
    "loss",
    [third, by_keyword, Called(), Module(), partial(third)],
    ids=["third", "keyword", "object", "module", "partial"],
)
def test_a_loss_with_a_parameter_of_that_name_gets_the_inputs(loss):
    assert binding(loss)("images")("outputs", "targets") == "images"


class OutputsAreCalledInputs(nn.Module):
    def forward(self, inputs, targets):
        return inputs


def second(targets, inputs):
    return targets


def any_names(outputs, targets, **options):
    assert not options
    return outputs


@pytest.mark.parametrize("loss", [OutputsAreCalledInputs(), second, any_names, max, nn.MSELoss(), lambda o, t: o])
def test_any_other_loss_is_called_as_it_is(loss):
    assert binding(loss)("images") is loss
