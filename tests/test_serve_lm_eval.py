"""lm-eval's local-completions, which asks `tunekit serve`, beside its HFLM, which loads the same folder itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_serve import folders as folders
from tests.test_serve import port as port

PROGRAM = Path(os.environ.get("TUNEKIT_PROGRAMS", "/nowhere")) / "lm-eval"
REQUESTS = """
import json, sys
from types import SimpleNamespace
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

folder, url = sys.argv[1:]
theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
ours = LocalCompletionsAPI(
    model="base", base_url=url, tokenizer=folder, tokenizer_backend="huggingface", batch_size=4, max_length=512
)
words = ["Once upon a time", "The sea is", "Yes", "Is it? No, it is"]
pairs = [(context, end) for context in words for end in (" there was", " not", " a long day of rain")]
scored = [SimpleNamespace(args=pair) for pair in pairs]
settings = {"until": ["a", "\\n\\n"], "max_gen_toks": 12, "do_sample": False}
asked = [SimpleNamespace(args=(context, dict(settings))) for context in words]
sides = []
for model in (ours, theirs):
    sides.append({"scores": model.loglikelihood(scored), "texts": model.generate_until(asked)})
print("RESULT" + json.dumps(sides))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PROGRAM.is_dir(), reason="TUNEKIT_PROGRAMS has no lm-eval")
def test_local_completions_equals_hflm(port: int, tiny_llama: Path) -> None:
    path = os.pathsep.join([str(PROGRAM), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-c", REQUESTS, str(tiny_llama), f"http://127.0.0.1:{port}/v1/completions"]
    ended = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if "No module named 'aiohttp'" in ended.stderr or "'ClientSession' is not defined" in ended.stderr:
        pytest.skip("lm-eval is installed without its extra 'api'")
    assert ended.returncode == 0, ended.stderr
    ours, theirs = json.loads(ended.stdout.partition("RESULT")[2])
    assert ours["texts"] == theirs["texts"]
    assert [greedy for _, greedy in ours["scores"]] == [greedy for _, greedy in theirs["scores"]]
    for (score, _), (expected, _) in zip(ours["scores"], theirs["scores"], strict=True):
        assert score == pytest.approx(expected, abs=1e-4)
