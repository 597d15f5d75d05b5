"""The entry point; every refusal is one line and exit code 2."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

import widthkit.cli.bench
import widthkit.cli.export
import widthkit.cli.job
import widthkit.cli.plot
import widthkit.cli.recipes
import widthkit.cli.space
import widthkit.cli.trace  # noqa: F401
from widthkit.cli.app import app
from widthkit.cli.generate import as_flag
from widthkit.errors import WidthkitError

_OUT_OF_MEMORY = "out of memory; lower --batch-size or --image-size"
_INTERRUPTED = "interrupted; the same command with --resume goes on from the last checkpoint"
_UsageError: Any = typer.BadParameter.__base__
"""What Typer raises for a wrong command line; it exports only this subclass."""


def main() -> None:
    """Run the command line; refusals become one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
        _leave_group()
        # Here, where it can still be refused: at shutdown Python would drop what a full disk did not take.
        sys.stdout.flush()
    except WidthkitError as error:
        _fail(" ".join(error.message(as_flag).split()), 2)
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
    except typer.Abort:
        _fail(_INTERRUPTED, 130)
    except _UsageError as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx is not None else ""
        _fail(" ".join(error.format_message().split()) + where, 2)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "DefaultCPUAllocator" not in str(error):
            raise
        _fail(_OUT_OF_MEMORY, 2)
    if code == 130:
        # Typer turns Ctrl-C into this code without a word.
        _fail(_INTERRUPTED, 130)
    sys.exit(code if isinstance(code, int) else 0)


def _leave_group() -> None:
    """Destroy the process group under torchrun; its threads would abort the interpreter at exit."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _fail(line: str, code: int) -> None:
    print(f"error: {line}" if code == 2 else line, file=sys.stderr)
    sys.exit(code)
