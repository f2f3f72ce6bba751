"""The order of the commands in `tunekit --help`: the order in which a user needs them."""

from typing import Any

from typer.core import TyperGroup

ORDER = (
    *("init", "import", "validate", "data", "preview", "plan", "train", "sweep", "launch", "watch", "runs"),
    *(
        "report",
        "audit",
        "eval",
        "chat",
        "generate",
        "serve",
        "merge",
        "export",
        "adapter",
        "reward",
        "recipes",
        "schema",
        "doctor",
    ),
)


class InOrderOfUse(TyperGroup):
    """The commands of the program. A command that is not in ORDER comes last."""

    def list_commands(self, context: Any) -> list[str]:
        """The names, in order."""
        names = super().list_commands(context)
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
