"""Measures anonymous host memory and time of loading a quantized base: a random llama of 1.1B parameters in bfloat16
shards.

    scripts/bench/run load [--quantization nf4] [--layers 22] [--json FILE] [--work FOLDER]

The base (TinyLlama's shape, 2.2 GB for 22 layers) is written shard by shard and loaded in fresh processes: first it is
quantized, then mapped from the cache file, then quantized with a read-only cache folder, so that all weights stay in
memory. RssAnon is sampled every 10 ms from before the load to after a forward pass of 8 tokens; `held` is its growth at
the end of the load.  The bar: growth under the packed size + 300 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ALLOWED_BYTES = 300_000_000  # above the packed size
HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, GROUPS = 2048, 5632, 32000, 32, 4

WRITE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
folder, layers, shards = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
hidden, wide, vocabulary, heads, groups = json.loads(sys.argv[4])
from transformers import LlamaConfig
config = LlamaConfig(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, vocab_size=vocabulary,
    num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=False, dtype="bfloat16",
    architectures=["LlamaForCausalLM"], max_position_embeddings=2048)
config.save_pretrained(folder)
small = hidden // heads * groups
shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
for layer in range(layers):
    of = f"model.layers.{layer}."
    for name, shape in dict(q_proj=(hidden, hidden), k_proj=(small, hidden), v_proj=(small, hidden),
                            o_proj=(hidden, hidden)).items():
        shapes[f"{of}self_attn.{name}.weight"] = shape
    for name, shape in dict(gate_proj=(wide, hidden), up_proj=(wide, hidden), down_proj=(hidden, wide)).items():
        shapes[f"{of}mlp.{name}.weight"] = shape
    shapes[f"{of}input_layernorm.weight"] = shapes[f"{of}post_attention_layernorm.weight"] = (hidden,)
shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
torch.manual_seed(0)
names, weight_map = list(shapes), {}
for shard in range(shards):
    file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
    part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
    save_file({name: torch.ones(shapes[name], dtype=torch.bfloat16) if len(shapes[name]) == 1 else
               torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02) for name in part},
              folder / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, file)
(folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
print(json.dumps({"bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors"))}))
"""

LOAD = """
import json, sys, threading, time
sys.path.insert(0, REPOSITORY)
import torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
from tests.support.packed import packed_hash
from tunekit.model.load import load_model
from tunekit.machine.memory import status_bytes
from tunekit.model.quantized.weights import stored_bytes
from tunekit.recipe.model import ModelSection
def memory():
    return {name: status_bytes(name) for name in ("RssAnon", "RssFile")}
samples, ended = [], threading.Event()
def sample():
    while not ended.wait(0.01):
        samples.append(memory())
section = ModelSection(name_or_path=sys.argv[1], quantization=sys.argv[2], dtype="bfloat16")
before = memory()
watch = threading.Thread(target=sample)
watch.start()
started, began = time.perf_counter(), time.process_time()
model = load_model(section, device=torch.device("cpu"))
seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - began
after = memory()
loading = max(each["RssAnon"] for each in [before, after, *samples])
model.net(input_ids=torch.arange(8)[None], use_cache=False)
ended.set()
watch.join()
print(json.dumps({
    "peak_anonymous": loading - before["RssAnon"],
    "held_anonymous": after["RssAnon"] - before["RssAnon"],
    "peak_with_forward": max(each["RssAnon"] for each in samples) - before["RssAnon"],
    "file_pages_after_forward": memory()["RssFile"] - before["RssFile"],
    "seconds": seconds, "cpu_seconds": cpu_seconds, "packed_bytes": stored_bytes(model.net),
    "mapped": model.sidecar is not None, "hash": packed_hash(model.net), "notes": model.notes}))
"""


def run_python(code: str, *arguments: str, cache: Path) -> dict:
    """The last line of a fresh interpreter's output, as JSON."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", TUNEKIT_CACHE=str(cache))
    text = code.replace("REPOSITORY", repr(str(REPOSITORY)))
    done = subprocess.run(
        [sys.executable, "-c", text, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as scratch:
        model, cache, nowhere = (Path(scratch) / name for name in ("model", "cache", "file"))
        model.mkdir()
        nowhere.write_text("a file, where no folder can be made", encoding="utf-8")
        sizes = json.dumps([HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, GROUPS])
        stored = run_python(WRITE, str(model), str(given.layers), str(given.shards), sizes, cache=cache)["bytes"]
        loads = {
            name: run_python(LOAD, str(model), given.quantization, cache=place)
            for name, place in (("first", cache), ("second", cache), ("in memory", nowhere))
        }
    if len({load["hash"] for load in loads.values()}) != 1:
        sys.exit("the loads differ")
    print(f"base {stored / 1e6:.0f} MB in {given.shards} shards, {given.quantization}")
    for name, load in loads.items():
        bar = load["packed_bytes"] + ALLOWED_BYTES
        verdict = "under" if load["peak_anonymous"] < bar else "OVER"
        print(
            f"{name:10} peak anonymous {load['peak_anonymous'] / 1e6:7.1f} MB, {verdict} {bar / 1e6:.1f} MB"
            f" (packed {load['packed_bytes'] / 1e6:.1f})  held {load['held_anonymous'] / 1e6:7.1f} MB"
            f"  {load['seconds']:5.1f} s, CPU {load['cpu_seconds']:5.1f} s"
        )
    if given.json:
        machine = {"machine": platform.machine(), "system": platform.platform(), "load": os.getloadavg()}
        found = {"machine": machine, "stored_bytes": stored, "loads": loads}
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
