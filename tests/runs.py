"""Watch which networks of a supernet really run, and let some of them diverge, through hooks on its modules."""

import itertools
import math


class Runs:
    """Every run of a network inside a supernet of ``small_net``, in order; its groups are named as their modules.

    Args:
        net: The supernet.
        n_batches: How many batches one judgement takes.
    """

    def __init__(self, net, n_batches=1):
        self.net, self.n_batches = net, n_batches
        self.widths = []
        self._now = {}
        for name in net.space.names:
            net.model.get_submodule(name).register_forward_hook(self._see(name))
        net.model.register_forward_hook(lambda *_: self.widths.append({n: self._now[n] for n in net.space.names}))

    def _see(self, name):
        def hook(module, args, output):
            self._now[name] = output.shape[1]

        return hook

    @property
    def networks(self):
        """Every judged width vector, each as often as it was judged."""
        found, rest = [], iter(self.widths)
        for widths in rest:
            others = list(itertools.islice(rest, self.n_batches * len(self.net.paths(widths)) - 1))
            assert all(other == widths for other in others)
            found.append(widths)
        return found

    def clear(self):
        self.widths.clear()


def let_diverge(net, bad):
    """Let the networks for which ``bad`` holds give NaN."""
    runs = Runs(net)
    net.model.register_forward_hook(lambda _, __, output: output * math.nan if bad(runs.widths[-1]) else output)
    return net


def stop_after(n):
    """Return a callback that interrupts a search at its n-th trial."""
    left = [n]

    def watch(trial, progress):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    return watch
