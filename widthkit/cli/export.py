"""Write slim networks: from a run's supernet, or from a network that was saved before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from widthkit.cli.app import app
from widthkit.cli.options import Device, read_widths, shape_of


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or a saved network such as out/mine/slim")],
    widths: Annotated[Path | None, typer.Option(help="JSON file: group name -> width; the search's by default")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write; RUN/slim by default")] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="safetensors (default), pt2, onnx or aoti; several times")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16, bf16 or fp64; the network's own by default")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Channels last in memory")] = False,
    fold_bn: Annotated[bool, typer.Option("--fold-bn", help="Fold batch norms into convolutions")] = False,
    device: Device = None,
    input_shape: Annotated[
        str | None, typer.Option("--input", help="For a saved network: shape of the example input, 2,3,224,224")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="For a saved network: a factory of your own that it may name")
    ] = None,
) -> None:
    """Write a slim network in any format; every file is checked against the network before it is kept."""
    from widthkit.export import check_formats

    form: dict[str, Any] = {"dtype": dtype, "channels_last": channels_last, "fold_bn": fold_bn}
    form["device"] = device or "cpu"
    chosen = formats or ["safetensors"]
    check_formats(chosen, **form)
    if run.is_dir() or not run.with_suffix(".json").exists():
        written = _from_run(run, widths, out, chosen, form, allow or [])
    else:
        written = _from_file(run, widths, out, chosen, form, shape_of(input_shape), allow or [])
    for path in written:
        typer.echo(path)


def _from_run(
    run: Path, widths: Path | None, out: Path | None, formats: list[str], form: dict[str, Any], allow: list[str]
) -> tuple[Path, ...]:
    from widthkit.run.pipeline import Folder, Job

    folder = Folder(run)
    job = Job(folder.config(), folder)
    if widths is None and folder.finished:
        typer.echo("a finished run: exporting its trained network; --widths takes the supernet's weights", err=True)
        return _from_file(folder.path / "slim", None, out, formats, form, None, allow)
    chosen = read_widths(widths) if widths else folder.result().widths
    job.require_supernet()
    return job.export_slim(chosen, out or _named(folder.path / "slim", form), formats, **form)


def _named(path: Path, form: dict[str, Any]) -> Path:
    """Name files of another form than the network's own after it, so that they do not replace its files."""
    tags = [form["dtype"] or "", "channels-last" * form["channels_last"], "folded" * form["fold_bn"]]
    return path.with_name("-".join([path.name, *filter(None, tags)]))


def _from_file(
    path: Path,
    widths: Path | None,
    out: Path | None,
    formats: list[str],
    form: dict[str, Any],
    shape: tuple[int, ...] | None,
    allow: list[str],
) -> tuple[Path, ...]:
    from widthkit.errors import OptionError
    from widthkit.export import load, origin_of, save

    if widths is not None:
        raise OptionError("--widths needs the folder of a run; a saved network has its widths already")
    slim = load(path, allow=allow)
    origin = origin_of(slim)
    known = origin.model if origin else None
    return save(
        slim,
        out or _named(path, form),
        formats=formats,
        model=known.name if known else None,
        kwargs=known.kwargs if known else None,
        example_inputs=shape,
        say=lambda line: typer.echo(line, err=True),
        **form,
    )
