"""Arguments and options of several commands, for typer."""

import os
from typing import Annotated

import typer

from tunekit.commands.completion import among, complete_recipe_file, override

RECIPE = typer.Argument(metavar="RECIPE", help="a recipe file (YAML)", autocompletion=complete_recipe_file)
RecipeFile = Annotated[str, RECIPE]


def keys(help: str, *sections: str) -> object:
    """A command-line argument for KEY=VALUE words, for keys of these sections; without sections, for all keys."""
    return typer.Argument(metavar="KEY=VALUE", help=help, autocompletion=override(*sections))


Overrides = Annotated[list[str] | None, keys("training.learning_rate=1e-4 changes a key, ~training.epochs removes one")]
SweptOverrides = Annotated[
    list[str] | None,
    keys("training.learning_rate=1e-4,3e-4 tries two values; training.epochs=2 changes a key of all trials"),
]
TargetKeys = Annotated[
    list[str] | None,
    keys("changes keys of model.* and evaluation.*, such as evaluation.batch_size=1", "model.", "evaluation."),
]
TARGET = (
    "a run, a checkpoint (RUN@120, RUN@best, RUN@last), an adapter, a model folder, a .gguf file, a recipe or a name "
    "of the hub"
)
TargetName = Annotated[str, typer.Argument(metavar="TARGET", help=TARGET)]
Penalties = Annotated[
    list[str] | None,
    typer.Option(
        "--penalty",
        metavar="NAME=VALUE",
        help="changes the choice of tokens: repetition_penalty, presence_penalty, frequency_penalty or min_p; may be "
        "repeated",
    ),
]
Base = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="the base model of an adapter")]
Output = Annotated[str, typer.Option("--output", metavar="DIR", help="the new adapter folder")]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="write the result to this file as JSON; - is standard output"),
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="run the code that the run's recipe names (remote code, reward functions)")
]


def _set_device(name: str | None) -> str | None:
    """Set the variable that all code below reads."""
    if name:
        os.environ["TUNEKIT_DEVICE"] = name
    return name


Device = Annotated[
    str | None,
    typer.Option(
        metavar="cpu|cuda[:N]|xpu[:N]|mps",
        callback=_set_device,
        autocompletion=among("cpu", "cuda", "xpu", "mps"),
        help="the device; default: $TUNEKIT_DEVICE, else this machine's accelerator, else its CPU",
    ),
]
LaunchDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="cpu",
        callback=_set_device,
        autocompletion=among("cpu"),
        help="start the processes on CPUs, without GPUs",
    ),
]
