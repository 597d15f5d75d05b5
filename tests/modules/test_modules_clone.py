"""Copies and the names of what they hold."""

from __future__ import annotations

import pytest
import torch
from topologies import PlainChain, TiedWeight
from torch import nn

from widthkit.errors import ModelError
from widthkit.modules.clone import all_names, clone_with, meta_clone, named_tensors, real_clone


def test_a_shared_tensor_has_one_first_name_and_all_its_names():
    model = TiedWeight()
    assert all_names(model)["a.weight"] == ["a.weight", "b.weight"]
    assert "b.weight" not in named_tensors(model)


def test_a_meta_copy_has_no_memory_and_a_real_copy_has_its_own():
    model = PlainChain()
    assert {t.device.type for t in named_tensors(meta_clone(model)).values()} == {"meta"}
    copy = real_clone(model)
    with torch.no_grad():
        copy.head.weight.zero_()
    assert model.head.weight.abs().sum() > 0


def test_gradients_are_not_copied():
    model = PlainChain()
    model(torch.zeros(1, 3, 8, 8)).sum().backward()
    assert all(p.grad is None for p in real_clone(model).parameters())
    assert model.head.weight.grad is not None


def test_a_model_that_cannot_be_copied_says_so():
    class Odd(nn.Module):
        def __deepcopy__(self, memo):
            raise TypeError("never")

    with pytest.raises(ModelError, match="never"):
        clone_with(Odd(), lambda _, t: t)
