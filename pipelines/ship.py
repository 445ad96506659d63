"""A trained model made ready to come with medseg: halved, judged by a cross-validation, described by a model card."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

import medseg
from medseg.cli.shared import new_app
from medseg.terminal import err, out
from medseg_pipelines.markdown import markdown_table
from medseg_pipelines.trials import first_difference

log = logging.getLogger("medseg.ship")

USAGE = 2
# of the steps of the folds, a run that ships must have at least this share: clocks differ a little
LEAST_SHARE = 0.9
LUCK_AND_LENGTH = ("epochs", "time_budget_s", "steps_per_epoch", "seed", "deterministic", "save_every_s", "precision")
CARDS = Path(__file__).parent / "cards"
PAGE, DESCRIPTION = "README.md", "model.json"

app = new_app("medseg_pipelines.ship")


@app.command(
    epilog="Example: python -m medseg_pipelines.ship runs/all crossval/crossval.json -o medseg/models/hippocampus"
)
def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of the model.")],
    crossval: Annotated[Path, typer.Argument(metavar="crossval.json", help="How its recipe was judged.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Its folder; the name is the model's.")],
    about: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Data, licence, use, limits; left out: that of the name.")
    ] = None,
) -> None:
    """Write a model's folder: weights in half precision, model.json, and its card README.md."""
    try:
        made = ship(run, crossval, output, about=about)
    except medseg.MedsegError as error:
        err.print(f"[red]error:[/red] {escape(str(error))}")
        raise typer.Exit(USAGE) from error
    out.print(f"{escape(str(made.folder))}: {made.size / 1e6:.1f} MB")


def ship(run: Path, crossval: Path, folder: Path, *, about: Path | None = None) -> medseg.ShippedModel:
    """Write the model of a run folder and its card into `folder`; its Dice is that of the same recipe in `crossval`.

    `about`: YAML with what no file can tell; left out, that in `cards/` of the folder's name. Raises `ConfigError` for
    a cross-validation that is not finished or of another recipe, `ModelError` for a model that cannot ship.
    """
    words = _words(about or CARDS / f"{folder.name}.yaml")
    record = _read_json(crossval)
    network = _network(record, _read_json(run / DESCRIPTION), crossval, run)
    method = _method(record, network["name"], crossval)
    card = medseg.make_card(
        words | {"dice": _figures(method, crossval), "judged": _judged(record["setup"])}, source=str(crossval)
    )
    folds = [crossval.parent / network["name"] / f"fold_{fold['fold']}" for fold in network["folds"]]
    made = medseg.ship_model(run, folder, card, like=folds)
    medseg.write_text(folder / PAGE, page(made, _read_json(folder / DESCRIPTION)))
    return made


def page(model: medseg.ShippedModel, description: Mapping[str, Any]) -> str:
    """The model card as Markdown."""
    card = model.card
    rows = [[name, f"{d.mean:.3f}", f"{d.low:.3f} to {d.high:.3f}", str(d.cases)] for name, d in card.dice.items()]
    training, config = description["training"], description["config"]
    half = description["half_precision"]
    spacing = config["preprocess"]["spacing_mm"]
    grid = f"{' × '.join(f'{s:g}' for s in spacing)} mm" if spacing else "the picture's own pixels"
    trained = [
        f"{training['steps']} steps in {training['seconds'] / 60:.0f} minutes on {training['device']}, "
        f"{'in float32' if training['precision'] == '32' else 'in ' + training['precision']}, "
        f"on {training['cases']} cases of `{training['data_set']}` (SHA-256 of the files {training['data_sha256']}).",
        f"Network `{config['network']['name']}`, patches of {_by(config['windows']['patch_size'])} voxels at {grid}, "
        f"batch {config['train']['batch_size']}, learning rate {config['train']['learning_rate']:g}, "
        f"seed {config['train']['seed']}; all settings are in `{DESCRIPTION}`.",
        f"Weights: {model.size / 1e6:.1f} MB, kernels in half precision. On a patch of noise the rounding moves logits "
        f"of up to {half['largest_logit']:.3g} by {half['largest_difference_of_logits']:.2g} at most, and "
        f"{half['voxels_of_another_label']:.4%} of the voxels get another label.",
    ]
    use = f"```\nmedseg infer scan{_ending(config)} -m {model.name} -o masks\n```"
    versions = ", ".join(f"{name} {number}" for name, number in description["versions"].items())
    sections: Sequence[tuple[str, str]] = (
        ("What it segments", f"{_sentence(card.segments)}\n\n{use}"),
        ("Dice", f"{markdown_table(['label', 'mean', '95 % interval', 'cases'], rows)}\n\n{_sentence(card.judged)}"),
        ("Data", f"{_sentence(card.data)} Origin: {_sentence(card.origin)}"),
        ("Licence", f"{card.licence}. {_sentence(card.attribution)}"),
        ("Intended use", _sentence(card.intended_use)),
        ("Limits", "\n".join(f"- {limit}" for limit in card.limits)),
        ("Training", "\n\n".join(trained)),
        ("Versions", f"{versions}. SHA-256 of `model.safetensors`: `{model.sha256}`, checked whenever it is loaded."),
    )
    return f"# {model.name}: {card.title}\n\n" + "\n".join(f"## {head}\n\n{text}\n" for head, text in sections)


def _network(record: Mapping[str, Any], description: Mapping[str, Any], crossval: Path, run: Path) -> Mapping[str, Any]:
    """The network of the cross-validation that was trained as the run was, on the same data and no longer."""
    if not record.get("complete"):
        raise medseg.ConfigError(f"{crossval}: is not finished; every case has to be judged before a model ships")
    training = description["training"]
    if training["data_set"] != record["setup"]["dataset"]:
        raise medseg.ConfigError(
            f"{run}: learnt `{training['data_set']}`, {crossval} is of `{record['setup']['dataset']}`; the Dice would "
            "be that of other data"
        )
    apart = {}
    for network in record["networks"]:
        other = first_difference(_recipe(network["config"]), _recipe(description["config"]))
        if other is None:
            longest = max(fold["steps"] for fold in network["folds"])
            if training["steps"] < LEAST_SHARE * longest:
                raise medseg.ConfigError(
                    f"{run}: was trained for {training['steps']} steps, the folds of {crossval} for up to {longest}; "
                    "train it as long, since the Dice is theirs"
                )
            return dict(network)
        apart[network["name"]] = other
    named = "; ".join(f"{name}: {what}" for name, what in apart.items())
    raise medseg.ConfigError(
        f"{run}: was not trained as any network in {crossval} ({named}); the Dice would be another's"
    )


def _recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides how good a model becomes, but for luck and for how long it was trained."""
    train = {key: value for key, value in config["train"].items() if key not in LUCK_AND_LENGTH}
    return {**config, "train": train}


def _method(record: Mapping[str, Any], network: str, crossval: Path) -> dict[str, Any]:
    """How a network did alone and without the post-processing of other folds."""
    for method in record["methods"]:
        if method["networks"] == [network] and not method["postprocess"]:
            return dict(method)
    raise medseg.ConfigError(f"{crossval}: does not tell how `{network}` did alone; collect it again")


def _figures(method: Mapping[str, Any], crossval: Path) -> dict[str, Any]:
    without = [name for name, found in method["labels"].items() if found["ci95"] is None]
    if without:
        raise medseg.ConfigError(f"{crossval}: no interval for `{without[0]}`; judge more cases")
    return {
        name: {"mean": found["mean"], "low": found["ci95"][0], "high": found["ci95"][1], "cases": found["n"]}
        for name, found in method["labels"].items()
    }


def _judged(setup: Mapping[str, Any]) -> str:
    # a data set that names no patients counts every case as one
    named = setup["patients"] != setup["cases"]
    whose = f" of {setup['patients']} patients" if named else ""
    return (
        f"{setup['folds']}-fold cross-validation of the same recipe, {setup['cases']} cases{whose}, each judged by a "
        "model that has not learnt it; windows and copies of them were chosen on the same cases; 95 % bootstrap "
        f"interval over {'patients' if named else 'cases'}"
    )


def _words(path: Path) -> dict[str, Any]:
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CARDS.glob("*.yaml")))
        raise medseg.ConfigError(f"{path}: no such file; give --about, or a folder named as one of {known}")
    return medseg.read_yaml(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise medseg.ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise medseg.ConfigError(f"{path}: holds {type(content).__name__}, expected an object")
    return content


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _by(numbers: Sequence[int]) -> str:
    return " × ".join(map(str, numbers))


def _ending(config: Mapping[str, Any]) -> str:
    return ".nii.gz" if config["data"]["spatial_dims"] == 3 else ".png"


if __name__ == "__main__":
    app()
