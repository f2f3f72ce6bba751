"""Launch files: what each engine would run. scripts/engines runs them under torchrun, SLURM and Ray."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tunekit.commands.training import launch
from tunekit.errors import InputError, RecipeError
from tunekit.files.lock import WATCHING_SECONDS
from tunekit.launch import launch_verb
from tunekit.planning.launch.job import ENGINES, load_engine
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.shipped import shipped_recipes
from tunekit.recipes import copy_recipe

NAME = "my orders' run.yaml"  # a blank and a quote
ECHO = """#!/bin/sh
python3 -c 'import json, os, sys; print(json.dumps([os.getcwd(), sys.argv[1:]]))' "$@"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe and its data, and with programs that print their arguments instead of running."""
    place = tmp_path / "a place"
    place.mkdir()
    copy_recipe(shipped_recipes()["smoke"], place / NAME)
    monkeypatch.chdir(place)
    monkeypatch.delenv("TUNEKIT_DEVICE", raising=False)
    return place


def written(on: str, *overrides: str, nodes: int = 1, processes: int = 1) -> Path:
    """The launch file of an engine."""
    launch_verb(load_recipe(NAME, overrides), NAME, overrides, on, nodes, processes, f"file-{nodes}")
    return Path(f"file-{nodes}")


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_every_file_of_the_folder_is_an_engine() -> None:
    files = {path.stem for path in Path(sys.modules["tunekit.planning.launch.job"].__file__ or "").parent.glob("*.py")}
    assert files - {"__init__", "job"} == set(ENGINES)
    with pytest.raises(InputError, match="--on slum: unknown engine; did you mean 'slurm'"):
        load_engine("slum")


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_gets_the_recipe_and_its_changes(
    folder: Path, nodes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", program(folder.parent / "py thon", ECHO))
    file = written("torchrun", "training.seed=3", nodes=nodes, processes=4)
    monkeypatch.setenv("HEAD", "node-1")
    ended = subprocess.run(["sh", str(file.absolute())], cwd="/", capture_output=True, text=True, check=True)
    place, words = json.loads(ended.stdout)
    assert place == str(folder)
    head = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "my-orders-run", "--rdzv-endpoint", "node-1:29500"]
    group = head if nodes == 2 else ["--standalone"]
    train = ["-m", "tunekit", "train", NAME, "training.seed=3", "--resume"]
    assert words == ["-m", "torch.distributed.run", *group, "--nproc-per-node", "4", *train]
    assert ("all nodes must see these paths" in capsys.readouterr().out) == (nodes == 2)


def test_a_stopped_run_has_time_for_its_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    echo = program(folder.parent / "python", "#!/bin/sh\necho $TORCH_ELASTIC_SHUTDOWN_TIMEOUT\n")
    monkeypatch.setattr(sys, "executable", echo)
    file = written("torchrun")
    for chosen, seconds in (({}, "600"), ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "50"}, "50")):
        ended = subprocess.run(["sh", file], env=os.environ | chosen, capture_output=True, text=True, check=True)
        assert ended.stdout.strip() == seconds


@pytest.mark.parametrize("on", ["torchrun", "slurm"])
def test_the_interpreter_is_one_of_the_shared_paths(
    on: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["/opt/py thon", str(folder / ".venv" / "bin" / "python")]
    for number, python in enumerate(shared, 2):
        monkeypatch.setattr(sys, "executable", python)
        written(on, nodes=number)
    outside, inside = (line for line in capsys.readouterr().out.splitlines() if line.startswith("all nodes must see"))
    assert outside.endswith(", '/opt/py thon' and its packages")
    assert inside.endswith(f": '{folder}'")


@pytest.mark.parametrize(("code", "queued"), [(0, False), (138, True), (143, False), (2, False)])
def test_slurm_queues_the_job_again_only_after_usr1(
    folder: Path, code: int, queued: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun and scontrol are stand-ins; scripts/engines runs the real ones."""
    monkeypatch.setattr(sys, "executable", program(folder.parent / "python", ECHO))
    file = written("slurm", nodes=2, processes=4)
    programs = folder.parent / "programs"
    programs.mkdir()
    ranks = "SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NTASKS=8"
    program(programs / "srun", f'#!/bin/sh\nshift\nenv {ranks} "$@" || exit 99\nexit {code}\n')
    program(programs / "scontrol", '#!/bin/sh\n[ "$1" = show ] && printf "node-3\\nnode-4\\n" || echo "$@" >requeued\n')
    cluster = {"SLURM_JOB_NODELIST": "node-[3-4]", "SLURM_JOB_ID": "41007", "PATH": f"{programs}:{os.environ['PATH']}"}
    ended = subprocess.run(["bash", file], env=os.environ | cluster, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    assert json.loads(ended.stdout) == [str(folder), ["-m", "tunekit", "train", NAME, "--resume"]]
    assert (Path("requeued").exists() and Path("requeued").read_text() == "requeue 41007\n") == queued
    lines = file.read_text().splitlines()
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4"} < set(lines)


def test_help_names_every_engine_and_other_devices_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = inspect.get_annotations(launch, eval_str=True)["on"].__metadata__[0].help
    assert all(name in names for name in ENGINES)
    with pytest.raises(InputError, match="--device cuda:1: each process of a launch file chooses its own GPU"):
        launch(NAME, device="cuda:1")
    assert not Path("my-orders-run.torchrun.sh").exists()


def test_a_job_without_gpus_asks_for_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNEKIT_DEVICE", "cpu")
    for on in ENGINES:
        text = written(on, nodes=1 + ENGINES.index(on), processes=2).read_text()
        assert not any(request in text for request in ("gpus-per-node", "nvidia.com/gpu", "use_gpu=True")), on
        assert "--device" in text, on
    assert "--gpus" not in capsys.readouterr().out


def test_files_for_clusters_of_containers_are_yaml(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = yaml.safe_load(written("skypilot", "output.dir=/runs/one", nodes=2, processes=4).read_text())
    assert (task["name"], task["num_nodes"], task["workdir"]) == ("my-orders-run", 2, str(folder))
    assert "--nproc-per-node 4" in task["run"]
    assert task["envs"] == {"TUNEKIT_URL": None, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
    assert subprocess.run(["sh", "-n"], input=task["run"], text=True, check=False).returncode == 0
    assert "the nodes see" in capsys.readouterr().out  # /runs/one is not in the working folder
    job = yaml.safe_load(written("kubernetes", nodes=3, processes=4).read_text())["spec"]
    trainer, patch = job["trainer"], job["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    pod = patch["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 4)
    assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": 4}}
    assert pod["containers"][0]["volumeMounts"] == [{"name": "work", "mountPath": str(folder)}]
    shell, option, command = trainer["command"]
    assert "exec env TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 torchrun" in command
    assert subprocess.run([shell, "-n", option, command], check=False).returncode == 0
    assert "the nodes see" not in capsys.readouterr().out


def test_ray_calls_the_command_line_in_each_worker(folder: Path) -> None:
    text = written("ray", nodes=2, processes=4).read_text()
    assert f"    sys.argv = {['tunekit', 'train', NAME, '--resume']!r}\n" in text
    assert "num_workers=8, use_gpu=True" in text


RAY = """
class Given:
    def __init__(self, *values, **named):
        self.named = named

FailureConfig = RunConfig = ScalingConfig = Given

class TorchTrainer:
    def __init__(self, train, run_config, scaling_config):
        self.train = train
        self.starts = 1 + run_config.named["failure_config"].named["max_failures"]

    def fit(self):
        for _ in range(self.starts):
            try:
                return [self.train() for _ in range(2)]
            except RuntimeError as error:
                print(error)
        raise error
"""


@pytest.mark.parametrize(
    ("code", "starts", "ends", "held"),
    [(0, 2, 0, ()), (2, 1, 2, ()), (3, 1, 3, ()), (4, 4, 1, ()), (143, 4, 1, ()), (2, 4, 0, (True, True, False))],
)
def test_ray_starts_only_what_can_end_otherwise(
    folder: Path, code: int, starts: int, ends: int, held: tuple[bool, ...]
) -> None:
    """A wrong recipe is one start, and its exit code that of the script; a lost worker is started again, also if its
    process still holds the run's folder (twice), after which the run succeeds."""
    path = written("ray", processes=2)
    for package, text in {
        "ray": "",
        "ray/train": RAY,
        "ray/train/torch": "from ray.train import TorchTrainer",
        "tunekit": "",
        "tunekit/cli": f"import sys\nheld = list({held})\ndef main():\n    print('start')\n"
        f"    sys.exit({code} if not {held} or held[0] else 0)",
        "tunekit/errors": "class TunekitError(Exception): pass",
        "tunekit/files": "",
        "tunekit/files/lock": "from tunekit.cli import held\ndef is_held(path): return bool(held) and held.pop(0)",
        "tunekit/recipe": "",
        "tunekit/recipe/load": "from unittest.mock import Mock\ndef load_recipe(*names):\n    loaded = Mock()\n"
        "    loaded.recipe.output.dir = 'run'\n    return loaded",
    }.items():
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(text)
    path.write_text(path.read_text().replace(f"sleep({WATCHING_SECONDS}", "sleep(0"))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    ended = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment, check=False)
    assert (ended.stdout.count("start\n"), ended.returncode) == (starts, ends), ended.stderr
    assert not [*folder.glob(".*.end")]


def test_the_shared_paths_include_a_recipe_of_another_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    recipe = f"../{NAME}"
    for on in ("slurm", "kubernetes"):
        launch_verb(load_recipe(recipe), recipe, (), on, 2, 1, f"file.{on}")
        assert shlex.quote(str(folder / NAME)) in capsys.readouterr().out, on
    launch_verb(load_recipe(recipe), recipe, (), "torchrun", 2, 1, "file")
    assert f"# Trains {recipe} with 1 process on each of 2 nodes." in Path("file").read_text()


def test_an_existing_file_is_never_replaced(folder: Path) -> None:
    file = written("slurm")
    assert written("slurm") == file  # the same content
    with pytest.raises(InputError, match="exists already with different content; remove it, or name another file"):
        written("slurm", "training.seed=3")
    with pytest.raises(InputError, match="--output data is a folder; name a new file"):
        launch_verb(load_recipe(NAME), NAME, [], "slurm", output="data")
    with pytest.raises(InputError, match="there is no folder away"):
        launch_verb(load_recipe(NAME), NAME, [], "slurm", output="away/file")
    shutil.copy(file, "other")
    assert "training.seed" not in Path("other").read_text()


def test_a_recipe_for_other_ranks_or_for_a_sweep_is_refused(folder: Path) -> None:
    changes = ("training.rank_speeds=[2, 1]", "memory.budget=[8GiB, 4GiB]", "evaluation.metrics=[loss]")
    assert "rank_speeds" in written("torchrun", *changes, processes=2).read_text()
    with pytest.raises(RecipeError) as caught:
        written("slurm", *changes, "sweep.seeds=2", "data.eval=0.1", nodes=2, processes=2)
    assert [str(problem) for problem in caught.value.problems] == [
        "command line: sweep: a launch file trains one run, and a sweep computes in one process; run `tunekit sweep "
        "'my orders'\"'\"' run.yaml'`, or add ~sweep to train the recipe's own values",
        *(
            f"command line: {key}: the list has 2 values, but --nodes 2 and --gpus 2 make 4 ranks; write one value for "
            "each rank, or change these options"
            for key in ("memory.budget", "training.rank_speeds")
        ),
    ]
    assert "~sweep" in written("ray", "data.eval=0.1", "~sweep", nodes=3).read_text()


def test_a_copy_of_the_working_folder_has_other_paths(folder: Path) -> None:
    """SkyPilot puts the copy into ~/sky_workdir."""
    recipe = str(folder / NAME)
    launch_verb(load_recipe(recipe), recipe, (), "skypilot", 1, 1, "file")
    assert str(folder) not in yaml.safe_load(Path("file").read_text())["run"]
    absolute = f"output.dir={folder / 'runs' / 'one'}"
    with pytest.raises(RecipeError, match=r"command line: output\.dir: the nodes have a copy .*; write runs/one"):
        written("skypilot", absolute, nodes=2)
    assert absolute in written("slurm", absolute, nodes=2).read_text()
    os.chdir(folder.parent)
    Path("other").mkdir()
    os.chdir("other")
    with pytest.raises(RecipeError, match="which does not contain this recipe; start `tunekit launch` in a folder"):
        launch_verb(load_recipe(recipe), recipe, (), "skypilot", 1, 1, "file")


@pytest.mark.parametrize("on", ENGINES)
def test_a_control_character_is_refused(on: str, folder: Path) -> None:
    """A line break would end a comment of a script, or a block of YAML."""
    with pytest.raises(InputError, match="control character"):
        written(on, "output.dir=a\nb")
    assert not Path("file-1").exists()


def test_yaml_names_any_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder / "run \N{ROCKET}"
    place.mkdir()
    shutil.copytree(folder / "data", place / "data")
    shutil.copy(NAME, place)
    monkeypatch.chdir(place)
    assert yaml.safe_load(written("skypilot").read_text("utf-8"))["workdir"] == str(place)
    job = yaml.safe_load(written("kubernetes", nodes=2).read_text("utf-8"))
    assert str(place) in str(job["spec"]["runtimePatches"])


def test_the_name_of_a_job_begins_with_a_letter(folder: Path) -> None:
    shutil.copy(NAME, "7b run.yaml")
    launch_verb(load_recipe("7b run.yaml"), "7b run.yaml", (), "kubernetes", 1, 1, "file")
    assert yaml.safe_load(Path("file").read_text())["metadata"]["name"] == "run-7b-run"


def test_the_printed_command_changes_no_path(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = folder / "IMAGENET CLAIMS"
    place.mkdir()
    shutil.copytree(folder / "data", place / "data")
    shutil.copy(NAME, place / "IMAGE.yaml")
    os.chdir(place)
    launch_verb(load_recipe("IMAGE.yaml"), "IMAGE.yaml", (), "kubernetes", 1, 1, "file")
    command = capsys.readouterr().out.partition("submit it: ")[2].partition(" |")[0]
    shown = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    job = yaml.safe_load(shown)
    assert job["spec"]["trainer"]["image"] == "YOUR/IMAGE:1"
    assert "claimName': 'YOUR-CLAIM'" in str(job)
    assert str(place) in str(job["spec"]["runtimePatches"])
    assert "IMAGE.yaml" in job["spec"]["trainer"]["command"][2]


def test_the_command_line_reads_the_device(folder: Path) -> None:
    run = [sys.executable, "-m", "tunekit", "launch", NAME, "--device", "cuda:1"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "chooses its own GPU" in done.stderr
