"""The entry point; every refusal is one line and exit code 2."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import widthkit.cli.bench
import widthkit.cli.export
import widthkit.cli.job
import widthkit.cli.plot
import widthkit.cli.space
import widthkit.cli.trace  # noqa: F401
from widthkit.cli.app import app
from widthkit.errors import WidthkitError


def main() -> None:
    """Run the command line; refusals become one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
        _leave_group()
        # Here, where it can still be refused: at shutdown Python would drop what a full disk did not take.
        sys.stdout.flush()
    except WidthkitError as error:
        _fail(with_flags(" ".join(str(error).split())), 2)
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, 130)
    except MemoryError:
        _fail(_OUT_OF_MEMORY, 2)
    except BrokenPipeError:
        # Whoever read our output has seen enough; keep Python from complaining while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 2)
    except Exception as error:
        if isinstance(error, RuntimeError) and ("out of memory" in str(error) or "DefaultCPUAllocator" in str(error)):
            _fail(_OUT_OF_MEMORY, 2)
        if type(error).__name__ == "Abort":
            _fail(_INTERRUPTED, 130)
        if not hasattr(error, "format_message"):
            raise
        _fail(" ".join(error.format_message().split()) + _command_hint(error), 2)
    if code == 130:
        # Typer turns Ctrl-C into this code without a word.
        _fail(_INTERRUPTED, 130)
    sys.exit(code if isinstance(code, int) else 0)


def _leave_group() -> None:
    """Take leave of the other processes under torchrun; threads that wait for them would abort this one at its end."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


_FLAGS = {
    "alpha": "--alpha",
    "augment": "--augment",
    "batch_size": "--batch-size",
    "beta": "--bins",
    "bins": "--bins",
    "calibrate": "--calibrate",
    "data_dir": "--data-dir",
    "device": "--device",
    "divisor": "--divisor",
    "epochs": "--epochs",
    "evaluations": "--evaluations",
    "freeze": "--freeze",
    "image_size": "--image-size",
    "k": "--k",
    "lr": "--lr",
    "max_width": "--max-width",
    "memory": "--search-memory",
    "min_width": "--min-width",
    "mixed_precision": "--precision",
    "optimizer": "--optimizer",
    "rank": "--rank",
    "schedule": "--schedule",
    "score_model": "--score-model",
    "seed": "--seed",
    "stages": "--stages",
    "weight_decay": "--weight-decay",
}
"""What options of functions are called on the command line."""
_WRITTEN = re.compile(rf"(?<![\w.,/@('=:-])({'|'.join(sorted(_FLAGS, key=len, reverse=True))})=(?=[^\s,;])")
_SPOKEN = re.compile(rf"(?<![\w.'/-])({'|'.join(name for name in _FLAGS if '_' in name)})(?![\w.'/=(])")


def with_flags(line: str) -> str:
    """Name options in a message as people write them here; options of plug-ins keep their names.

    >>> with_flags("mixed_precision='fp16' cannot be used on a CPU; lower min_width")
    "--precision 'fp16' cannot be used on a CPU; lower --min-width"
    >>> with_flags("risk=2: a probability above 0 and below 1")
    'risk=2: a probability above 0 and below 1'
    >>> with_flags("there is no folder /data/seed=3/lr=0.1; 'dbc' has k=, seed=")
    "there is no folder /data/seed=3/lr=0.1; 'dbc' has k=, seed="
    """
    line = line.replace("resume=False", "a run without --resume")
    line = _WRITTEN.sub(lambda found: f"{_FLAGS[found[1]]} ", line)
    return _SPOKEN.sub(lambda found: _FLAGS[found[1]], line)


_OUT_OF_MEMORY = "out of memory; lower --batch-size or --image-size"
_INTERRUPTED = "interrupted; the same command with --resume goes on from the last checkpoint"


def _command_hint(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return f" (see {context.command_path} --help)" if context is not None else ""


def _fail(line: str, code: int) -> None:
    print(f"error: {line}" if code == 2 else line, file=sys.stderr)
    sys.exit(code)
