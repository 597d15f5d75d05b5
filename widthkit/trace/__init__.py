"""Find the channel groups of a model by running it on labels."""

from widthkit.trace.tracer import trace

__all__ = ["trace"]
