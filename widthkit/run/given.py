"""The trained network that a run starts from: how accurate it is before anything changes."""

from __future__ import annotations

from widthkit.run.build import Built
from widthkit.run.dense import fresh_model, has_trained_weights, load_trained
from widthkit.run.steps import JUDGED_TOGETHER
from widthkit.train import evaluate, make_loader

_SUSPICIOUS = 1.5
"""An accuracy of at most so many times that of guessing is no trained network's."""


def evaluate_given(built: Built) -> float | None:
    """Measure the given weights as they are, in eval mode with their own statistics, and say the result.

    Args:
        built: What the run works with.

    Returns:
        Their accuracy on the test images; ``None`` where the run starts from fresh weights. Nothing is decided by it.
    """
    config, data = built.config, built.data
    accuracy = None
    if has_trained_weights(config):
        model = fresh_model(config, data, config.seed)
        load_trained(model, config)
        found = evaluate(model, make_loader(data.test, JUDGED_TOGETHER, train=False), device=config.device)
        accuracy = found["accuracy"]
        built.say(f"dense: {accuracy:.2%} on {found['images']} test images")
        if built.fresh:
            shown = ", ".join(built.fresh[:4])
            built.say(f"dense: the weights lack {len(built.fresh)} tensors, which are fresh: {shown}")
        elif accuracy <= _SUSPICIOUS / data.num_classes:
            built.say(
                "dense: this is hardly better than guessing; the preprocessing or the order of classes may be wrong"
            )
    built.say(f"inputs: {data.inputs}")
    return accuracy
