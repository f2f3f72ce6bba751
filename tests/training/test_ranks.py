"""Two CPU processes give the curve of one: torchrun and accelerate launch, on 23 uneven rows."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.train_case import free_port, records, train_in_child, write_recipe

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch"]
CONFIGURATION = """compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
machine_rank: 0
main_process_ip: 127.0.0.1
main_process_port: {port}
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: true
"""


def run_two(launcher: list[str], recipe: Path, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    module = ["-m", "tunekit"]
    if launcher is ACCELERATE:
        run.parent.mkdir(exist_ok=True)
        (run.parent / "accelerate.yaml").write_text(CONFIGURATION.format(port=free_port()))
        module = ["--config_file", str(run.parent / "accelerate.yaml"), "--module", "tunekit"]
    command = [sys.executable, *launcher, *module, "train", str(recipe), f"output.dir={run}", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TUNEKIT_DEVICE": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 rows in micro-batches of 2, 11 a step: the second step of an epoch has one, so one rank has none."""
    os.environ["TUNEKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return write_recipe(
        tmp_path_factory.mktemp("ranks"),
        tiny_llama,
        data={"eval": None},
        adapter={"dropout": 0.1},  # masks do not depend on the rank
        training={"gradient_accumulation_steps": 11, "epochs": 3.0},
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_give_the_curve_of_one(recipe: Path, tmp_path: Path, launcher: list[str]) -> None:
    one = train_in_child(recipe, tmp_path / "one")
    assert one.code == 0, one.output
    two = run_two(launcher, recipe, tmp_path / "two")
    assert two.returncode == 0, two.stdout + two.stderr
    assert two.stdout.count("report:") == 1  # only the main rank prints
    require_same_curve(tmp_path / "one", tmp_path / "two")
    assert json.loads((tmp_path / "two" / "report.json").read_text())["device"] == "cpu"  # without a number


def require_same_curve(one: Path, two: Path) -> None:
    single, double = ([record for record in records(run) if "loss" in record] for run in (one, two))
    assert len(single) == len(double) == 6
    for left, right in zip(single, double, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-4)
        for name in ("step", "epoch", "learning_rate", "tokens", "supervised_tokens"):
            assert right[name] == left[name]


COUNTING = """
import json, os, sys
from tunekit.model.text.decoder import Decoder
from tunekit.tuned.model import TunedModel

calls = {"forward": 0, "answers": 0}
forward, start = TunedModel.output, Decoder.__init__

def counted(name, function):
    def call(*values, **named):
        calls[name] += 1
        return function(*values, **named)
    return call

TunedModel.output = counted("forward", forward)
Decoder.__init__ = counted("answers", start)
from tunekit.cli import main

try:
    main()
finally:
    with open(os.path.join(os.environ["COUNTS"], os.environ["RANK"]), "w") as file:
        json.dump(calls, file)
"""


@pytest.mark.drawn
def test_a_rank_with_fewer_rows_makes_fewer_forwards_and_the_curve_is_that_of_one(recipe: Path, tmp_path: Path) -> None:
    """Steps, evaluations and answers: a rank that has none left waits for the others."""
    (tmp_path / "counting.py").write_text(COUNTING)
    metrics = ["data.eval=0.2", "training.eval_steps=2", "evaluation.batch_size=2", "evaluation.metrics=[exact_match]"]
    metrics += ["evaluation.max_new_tokens=2", "training.gradient_accumulation_steps=8"]  # 9 micro-batches an epoch
    words = [str(tmp_path / "counting.py"), "train", str(recipe), f"output.dir={tmp_path / 'two'}", *metrics]
    places = {"COUNTS": str(tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TUNEKIT_DEVICE": "cpu"} | places
    command = [sys.executable, *TORCHRUN, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in ("0", "1"))
    assert first["forward"] > second["forward"] > 0
    assert first["answers"] > 0
    assert done.stdout.count("report:") == 1, "only the main rank prints"
    one = train_in_child(recipe, tmp_path / "one", *metrics)
    assert one.code == 0, one.output
    require_same_curve(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
def test_two_processes_give_the_preferences_of_one(tiny_llama: Path, tmp_path: Path, loss_type: str) -> None:
    """11 pairs, five to a step, so that the last step of an epoch has one and one rank none; what is logged of the
    reference is summed over ranks too, and aot compares the pairs of both."""
    rows = [
        {
            "prompt": f"say {'very ' * (number % 4)}{number}\n",
            "chosen": "so " * (1 + number % 5),
            "rejected": f"x{number}",
        }
        for number in range(11)
    ]
    recipe = write_recipe(
        tmp_path,
        tiny_llama,
        data={"eval": None},
        adapter={"dropout": 0.0},
        training={"micro_batch_size": 1, "gradient_accumulation_steps": 5, "epochs": 2.0},
    )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "pairs.jsonl").write_text(lines, encoding="utf-8")
    named = [f"data.train={tmp_path / 'pairs.jsonl'}", "objective.method=dpo", f"objective.loss_type={loss_type}"]
    one = train_in_child(recipe, tmp_path / "one", *named)
    assert one.code == 0, one.output
    two = run_two(TORCHRUN, recipe, tmp_path / "two", *named)
    assert two.returncode == 0, two.stdout + two.stderr
    single, double = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(single) == len(double) == 6
    assert single[-1]["rewards_margins"] != 0
    for left, right in zip(single, double, strict=True):
        for name in ("loss", "rewards_chosen", "rewards_margins", "rewards_accuracies", "logps_rejected"):
            assert right[name] == pytest.approx(left[name], rel=1e-4, abs=1e-6), name


GATHERING = """
import sys
from types import SimpleNamespace
import torch
from tunekit.contracts import StepBatches
from tunekit.machine.devices import make_devices
from tunekit.tuned.model import ModelRun

with make_devices() as devices:
    run = ModelRun(None, None, devices.gather)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        step = torch.arange(42).view(14, 3).to(dtype) / 7  # the rows of micro-batches of 1, 4, 2, 5 and 2 rows
        step[0, 0], step[2, 1], step[5, 2] = -0.0, float("nan"), float("inf")
        parts = step.split([1, 4, 2, 5, 2])
        indices = [(4, 0, 3), (), (1, 2)][devices.rank]  # the second rank has none
        together = run.gather_rows(StepBatches(0, 0.0, indices, ()), [parts[index] for index in indices])
        assert together.dtype == dtype and together.shape == step.shape
        assert torch.equal(together.view(torch.uint8), step.view(torch.uint8)), "bit by bit"
print("gathered")
"""


@pytest.mark.drawn
def test_rows_of_all_ranks_are_gathered_in_the_order_of_the_step(tmp_path: Path) -> None:
    (tmp_path / "gathering.py").write_text(GATHERING)
    places = {"OMP_NUM_THREADS": "1", "TUNEKIT_DEVICE": "cpu", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, *TORCHRUN[:-1], "3", str(tmp_path / "gathering.py")]
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("gathered") == 3


DYING = """
import os, signal, sys, time
import torch
from tunekit.training.run import Run
from tunekit.cli import main
begin_step = Run.begin_step
def dying(run, step):
    if os.environ["RANK"] == "1" and run.state.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return begin_step(run, step)
Run.begin_step = dying
torch.distributed.destroy_process_group = lambda: time.sleep(600)  # as NCCL, which waits for the lost rank
main()
"""


@pytest.mark.slow
def test_two_processes_sample_and_learn_what_one_does(tiny_llama: Path, tmp_path: Path) -> None:
    """Completions, rewards over the whole step and its normaliser; of the last step one rank has no prompt."""
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"prompt": f"say {'very ' * (number % 4)}{number}", "answer": str(number)} for number in range(13)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text("def score(completions):\n    return [len(set(said)) for said in completions]\n")
    reward = [{"function": "rewards.py:score", "allow_code": True}]
    sampled = {"num_generations": 3, "max_completion_length": 6, "beta": 0.1, "scale_rewards": "batch"}
    values = {
        "model": {"name_or_path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": "train.jsonl", "max_length": 128},
        "objective": {"method": "grpo", "reward": reward, "num_iterations": 2, **sampled},
        "adapter": {"method": "lora", "r": 4},
        "training": {"learning_rate": 0.01, "micro_batch_size": 1, "gradient_accumulation_steps": 6, "epochs": 1},
        "output": {"dir": "run"},
    }
    values["training"] |= {"save_steps": 2, "eval_steps": 1}
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(values))
    one = train_in_child(recipe, tmp_path / "one")
    assert one.code == 0, one.output
    two = run_two(TORCHRUN, recipe, tmp_path / "two")
    assert two.returncode == 0, two.stdout + two.stderr
    alone, together = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(alone) == 6
    for ours, theirs in zip(together, alone, strict=True):
        assert [each["completion"] for each in ours["samples"]][:3] == [
            each["completion"] for each in theirs["samples"]
        ][:3]
        for name in (
            "loss",
            "kl",
            "entropy",
            "reward",
            "reward_std",
            "completions_mean_length",
            "clip_ratio_region_mean",
        ):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_a_lost_rank_is_named(recipe: Path, tmp_path: Path) -> None:
    script, run = tmp_path / "dying.py", tmp_path / "run"
    script.write_text(DYING)
    command = [sys.executable, *TORCHRUN, str(script), "train", str(recipe), f"output.dir={run}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TUNEKIT_DEVICE": "cpu", "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode != 0
    reason = f"rank 1 (on {socket.gethostname()}) of 2 is lost: its process has ended; see its last output"
    status = json.loads((run / "status.json").read_text())
    assert (status["exit_code"], status["reason"]) == (4, f"{reason}; continue with --resume"), ended.stderr
    assert reason in ended.stderr


ALONE = """
import os
from tunekit.errors import DataError
from tunekit.training.run import Run

begin_step = Run.begin_step

def failing(run, step):
    if os.environ["RANK"] == "1" and run.state.step == 1:
        raise DataError("the image is not there", "mend it", file="pictures/7.png")
    return begin_step(run, step)

Run.begin_step = failing
from tunekit.cli import main
main()
"""


@pytest.mark.slow
def test_an_error_of_another_rank_alone_is_printed_once_with_its_number(recipe: Path, tmp_path: Path) -> None:
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    command = [sys.executable, *TORCHRUN, str(script), "train", str(recipe), f"output.dir={tmp_path / 'run'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TUNEKIT_DEVICE": "cpu", "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode != 0
    assert ended.stderr.count("pictures/7.png: the image is not there; mend it") == 1, ended.stderr
    assert f"rank 1 (on {socket.gethostname()}) of 2 has failed: pictures/7.png" in ended.stderr


@pytest.mark.slow
def test_an_error_of_one_rank_is_told_once(recipe: Path, tmp_path: Path) -> None:
    ended = run_two(TORCHRUN, recipe, tmp_path / "run", "training.learning_rate=1e30", "training.scheduler=constant")
    assert ended.returncode != 0
    assert ended.stderr.count("is not finite") == 1
    assert '"exit_code": 3' in (tmp_path / "run" / "status.json").read_text()


SLOWLY = """
import os, sys, time
from tunekit.console import Console

printed, rank = Console.error, os.environ["RANK"]

def late(console, text):
    time.sleep(3 if rank == "0" else 0)
    printed(console, text)

Console.error = late
PLANT
from tunekit.cli import main
main()
"""
FULL = """
from tunekit.artifacts.run import RunFolder
from tunekit.errors import ResourceError
from tunekit.machine import peers

def refuse(folder, size):
    raise ResourceError("the disk is too small")

RunFolder.require_free_bytes = refuse
if rank == "1":  # it learns of the error while it waits for the main rank
    peers.SHORTEST_SECONDS = peers.POLLING_SECONDS = 3.0
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "text"),
    [
        ('sys.argv += ["training.learning_rate=1e30", "training.scheduler=constant"]', "is not finite"),
        ('sys.argv += ["data.train=absent.jsonl"]', "absent.jsonl: no such file"),
        ('sys.argv += ["data.train=absent.jsonl"] * int(rank)', "absent.jsonl: no such file"),
        (FULL, "the disk is too small"),
        ('sys.argv[1:] = ["plan", "absent.yaml"]', "absent.yaml: no such file"),
        ('sys.argv[1:] = ["plan", sys.argv[2], f"output.dir={sys.argv[2]}"]', "is not a folder"),
        ('sys.argv[1:] = ["merge", "absent", "--output", "merged"]', "merge computes in one process"),
    ],
    ids=["in a step", "early", "on one rank only", "of the main rank's work", "plan", "refusal", "merge"],
)
def test_the_main_rank_has_time_to_print_an_error_and_no_other_rank_does(
    plant: str, text: str, recipe: Path, tmp_path: Path
) -> None:
    """torchrun ends the main rank as soon as another rank has ended."""
    script = tmp_path / "slowly.py"
    script.write_text(SLOWLY.replace("PLANT", plant))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TUNEKIT_DEVICE": "cpu", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, *TORCHRUN, str(script), "train", str(recipe), f"output.dir={tmp_path / 'run'}"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.stderr.count(text) == 1, ended.stderr
