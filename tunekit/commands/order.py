"""The order in which `tunekit --help` lists the commands: that in which a person needs them."""

from typing import Any

from typer.core import TyperGroup

ORDER = (
    *("init", "import", "validate", "data", "preview", "plan", "train", "watch", "runs", "report"),
    *("eval", "chat", "generate", "serve", "merge", "export", "adapter", "reward", "recipes", "schema", "doctor"),
)


class InOrderOfUse(TyperGroup):
    """The commands of the program; one that has no place here comes last."""

    def list_commands(self, context: Any) -> list[str]:
        """The names, in order."""
        names = super().list_commands(context)
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
