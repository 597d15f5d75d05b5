"""Train a network of timm on handwritten digits and write its weights: the start of ``make demo``.

    python examples/train_digits.py out/demo/dense.safetensors

The network is the one that the demo makes slimmer. Its training resumes after an interruption.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import widthkit as wk
from widthkit.train import evaluate

MODEL = "timm/resnet10t"
EPOCHS = 10


def main() -> None:
    """Train and write; an existing file is left alone."""
    file = Path(sys.argv[1])
    if file.exists():
        print(f"{file} is there already", file=sys.stderr)
        return
    # As timm states them for this network; a run that starts from these weights then needs no options for them.
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    data = wk.load_data("digits", image_size=32, augment={"crop": 2}, mean=mean, std=std)
    net = wk.create_model(MODEL, num_classes=data.num_classes)
    wk.train(
        net, wk.make_loader(data.train, 64, train=True), EPOCHS, lr=0.05, label_smoothing=0.1,
        out=file.parent / "dense", resume=True,
    )  # fmt: skip
    test = wk.make_loader(data.test, 512, train=False)
    print(f"dense: {evaluate(net, test)['accuracy']:.2%}", file=sys.stderr)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, file)


if __name__ == "__main__":
    main()
