"""Several found networks trained as one: shared weights, batch norms of their own, several dense exports.

AutoSlim trains the networks that it found "individually or jointly (as a single slimmable network)"; the latter with
switchable batch normalisation (Yu et al. 2018): what cannot be shared between widths is each width's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from widthkit.errors import OptionError
from widthkit.export.dense import SeveralNetworks, export, judged_best
from widthkit.graph import Kept
from widthkit.graph.plan import Plan
from widthkit.search import Trial
from widthkit.supernet import Supernet
from widthkit.supernet.slices import SlicedModel
from widthkit.supernet.strategy import can_distill
from widthkit.train.losses import soft_cross_entropy
from widthkit.train.modes import as_arguments
from widthkit.train.step import StepContext


class JointNet(SeveralNetworks):
    """One slimmable network of a few fixed widths; train it with :func:`widthkit.train`.

    A step trains every network on the batch: the one of most MACs learns the labels, the others its soft output. Where
    the run has a teacher, the largest network learns from it too, and so do the others if they learn the labels.
    Calling the module runs the active network, the largest at first (:meth:`switch`).

    Args:
        net: The supernet that holds the shared weights; they are trained in place.
        networks: Widths, units, or trials of a search; of a trial the units that were judged best are taken.
        distill: Let the smaller networks learn from the largest one's output instead of the labels.
        private_affine: Give every network its own scales and biases of batch norms, besides its own statistics.

    Raises:
        OptionError: If there is no network, or the supernet's blocks merge.
        WidthsError: If widths do not fit.

    >>> import widthkit as wk
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> joint = JointNet(wk.make_supernet(model, example_inputs=(1, 3, 8, 8)), [{"0": 8}, {"0": 3}])
    >>> [dense[0].out_channels for dense in joint.networks()]
    [8, 3]
    """

    def __init__(
        self, net: Supernet, networks: Sequence[Kept | Trial], *, distill: bool = True, private_affine: bool = True
    ) -> None:
        super().__init__()
        if not isinstance(net, Supernet):
            raise OptionError(f"a joint network is made of a supernet, not of {type(net).__name__}; see make_supernet")
        if not networks or isinstance(networks, (Mapping, str)):
            raise OptionError("a joint network needs a list of widths of at least one network")
        if net.merges:
            raise OptionError(
                "networks whose blocks merge cannot be trained jointly; their merged exports share nothing"
            )
        self.net, self.distill, self.private_affine = net, distill, private_affine
        self.units = [net.units(*judged_best(widths)) for widths in networks]
        plans = [net.plan(units) for units in self.units]
        macs = [net.graph.macs(plan.widths) for plan in plans]
        self.largest = max(range(len(macs)), key=macs.__getitem__)
        self.active = self.largest
        self._paths = [path for path, m in net.model.named_modules() if isinstance(m, _BatchNorm)]
        # Exports bring batch norms of the right size, with the values that the supernet has now.
        dense = [export(net, units) for units in self.units]
        self.norms = nn.ModuleList(nn.ModuleList(d.get_submodule(path) for path in self._paths) for d in dense)
        self._slices = SlicedModel(net.model)
        self._prepared = [self._slices.prepare(self._without_private(plan)) for plan in plans]

    @property
    def model(self) -> nn.Module:
        """The model that all networks are parts of."""
        return self.net.model

    def switch(self, index: int) -> JointNet:
        """Make one of the networks the active one and return the module.

        Raises:
            OptionError: If there is no such network.
        """
        if not 0 <= index < len(self.units):
            raise OptionError(f"network {index} does not exist; there are {len(self.units)}")
        self.active = index
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active network."""
        return self._run(self.active, args, kwargs)

    def train_step(self, step: StepContext) -> Tensor:
        """Train every network on a batch, the largest first; returns its loss on the targets."""
        args, kwargs = as_arguments(step.inputs)
        with step.amp():
            outputs = self._run(self.largest, args, kwargs)
            loss = step.loss(outputs, step.targets)
            total = step.with_teacher(outputs, loss)
        step.backward(total)
        step.outputs = outputs.detach() if isinstance(outputs, Tensor) else outputs
        teach = self.distill and can_distill(outputs, step.targets, step.loss)
        for index in range(len(self.units)):
            if index != self.largest:
                with step.amp():
                    student = self._run(index, args, kwargs)
                    if teach:
                        total = soft_cross_entropy(student, outputs)
                    else:
                        total = step.with_teacher(student, step.loss(student, step.targets))
                step.backward(total)
        return loss.detach()

    def networks(self) -> list[nn.Module]:
        """Return every network as an ordinary dense one, with its own batch norms; nothing needs recalibration."""
        found = []
        for units, norms in zip(self.units, self.norms, strict=True):
            dense = export(self.net, units)
            state = {f"{path}.{key}": value for path, norm in self._own(norms) for key, value in norm.items()}
            dense.load_state_dict(state, strict=False)
            found.append(dense)
        return found

    def _run(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        private = {f"{path}.{key}": value for path, norm in self._own(self.norms[index]) for key, value in norm.items()}
        with self._slices.narrowed(self._prepared[index]):
            return functional_call(self.net.model, private, args, dict(kwargs))

    def _own(self, norms: Any) -> list[tuple[str, dict[str, Tensor]]]:
        """List what each batch norm of a network keeps to itself."""
        found = []
        for path, norm in zip(self._paths, norms, strict=True):
            own = dict(norm.named_buffers())
            found.append((path, {**own, **dict(norm.named_parameters())} if self.private_affine else own))
        return found

    def _without_private(self, plan: Plan) -> Plan:
        keys = ("running_mean", "running_var", *(("weight", "bias") if self.private_affine else ()))
        private = {f"{path}.{key}" for path in self._paths for key in keys}
        tensors = {name: dims for name, dims in plan.tensors.items() if name not in private}
        return Plan(plan.widths, plan.kept, tensors, plan.attributes, plan.shapes)

    def extra_repr(self) -> str:
        """Show how many networks there are."""
        return f"networks={len(self.units)}, distill={self.distill}, private_affine={self.private_affine}"
