"""What pyproject.toml cannot say: recipes/ travels inside the wheel, as tunekit/shipped_recipes."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies the tracked kinds of file of recipes/ beside the package; an editable install reads the clone's own."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        source, target = Path("recipes"), Path(self.build_lib, "tunekit", "shipped_recipes")
        shutil.rmtree(target, ignore_errors=True)
        recipes = (file for file in source.rglob("*.yaml") if "runs" not in file.parts)
        for file in sorted([*recipes, *source.glob("*.schema.json"), *source.glob("data/**/*.*")]):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


setup(cmdclass={"build_py": BuildWithRecipes})
