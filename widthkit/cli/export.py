"""Write slim networks: from a run's supernet, or from a network that was saved before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from widthkit.cli.app import app
from widthkit.cli.options import InputShape, read_widths, shape_of
from widthkit.errors import OptionError
from widthkit.export import check_formats, load, origin_of, save
from widthkit.run.build import build
from widthkit.run.folder import RunFolder
from widthkit.run.steps import export_widths, load_supernet


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
    device: Annotated[str, typer.Option(help="Where the network is exported, such as cpu or cuda:0")] = "cpu",
    input_shape: InputShape = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="For a saved network: a factory of your own that it may name")
    ] = None,
) -> None:
    """Write a slim network in any format; every file is checked against the network before it is kept."""
    form: dict[str, Any] = {"dtype": dtype, "channels_last": channels_last, "fold_bn": fold_bn, "device": device}
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
    folder = RunFolder(run)
    if widths is None and folder.finished:
        typer.echo("a finished run: exporting its trained network; --widths takes the supernet's weights", err=True)
        return _from_file(folder.path / "slim", None, out, formats, form, None, allow)
    config = folder.searched_config() if folder.search_file.exists() else folder.config()
    if widths is None:
        folder.check_not_interrupted()
        chosen = folder.result().widths
    else:
        chosen = read_widths(widths)
    folder.check_trained(config)
    built = build(config, folder, search=False, begins=False)
    load_supernet(built)
    return export_widths(built, chosen, out or _named(folder.path / "slim", form), formats, **form)


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
