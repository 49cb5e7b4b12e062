"What loading a released checkpoint takes at most, as the operating system counts it: the model, and never a second one."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells the most memory a program took"),
              pytest.mark.xdist_group("parallel")]

WRITE = """
import sys, torch
from dataclasses import replace
from mllm_nb.language.decoder import DecoderConfig
from mllm_nb.mllm import MLLM, MLLMConfig
from mllm_nb.papers import llava
from mllm_nb.vision.vit import ViTConfig
vit = ViTConfig.from_transformers({"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "hidden_act": "quick_gelu"})
language = DecoderConfig(vocab_size=4000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12)
model = MLLM(MLLMConfig(language, (replace(llava.CLIP_336, vit=vit),))).to(torch.bfloat16)
model.save_pretrained(sys.argv[1], shard_bytes=24e6)
"""

LOAD = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import LlamaForCausalLM
from mllm_nb.papers.llava import load_llava
from mllm_nb.training.loop import ParameterGroup, TrainingConfig, prepared
from mllm_nb.training.parallel import Plan, in_processes, own, shard, team_of
import torch.distributed._tensor, torch.distributed.fsdp

def megabytes(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024

def whole(folder: str, dtype: str) -> list[float]:
    before = megabytes("VmRSS")
    model = load_llava(folder, dtype=getattr(torch, dtype, None), language="decoder")
    total = sum(float(value.detach().flatten()[::512].float().sum()) for value in model.parameters())   # every page is read
    assert total == total
    return [sum(value.numel() * value.element_size() for value in model.parameters()) / 2 ** 20, megabytes("VmHWM") - before]

def shards(folder: str) -> list[float]:
    Path("/proc/self/clear_refs").write_text("5")   # what the parent took at most does not count
    plan = Plan(2, 1, 1, 2, "fsdp")
    team, before = team_of(plan), megabytes("VmRSS")
    model = load_llava(folder, language="decoder")
    with prepared(model, (ParameterGroup("*", frozen=False),)):
        team.join(model, "cpu")
        mine = sum(own(value).numel() * own(value).element_size() for value in model.parameters()) / 2 ** 20
        assert {own(value).dtype for value in model.parameters()} == {torch.float32}
        return [mine, megabytes("VmHWM") - before]

if __name__ == "__main__":
    folder, how = sys.argv[1:]
    print(json.dumps(in_processes(shards, 2, folder) if how == "fsdp" else whole(folder, how)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    subprocess.run([sys.executable, "-c", WRITE, folder], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert len(list(folder.glob("model-*.safetensors"))) > 6
    return folder


def measured(folder: Path, how: str) -> list:
    (folder / "load.py").write_text(LOAD)
    done = subprocess.run([sys.executable, folder / "load.py", folder, how], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["none", "float32", "float16"])
def test_a_checkpoint_is_loaded_without_a_second_copy(dtype, folder):
    "In its own dtype it is mapped; in another it is copied tensor by tensor, and the files' pages are given back."
    model, peak = measured(folder, dtype)
    print(f"{dtype}: {model:.0f} MB of weights, at most {peak:.0f} MB")
    assert 150 < model < 420 and peak < model + 40


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a forked process cannot be reset")
def test_straight_into_the_shards_of_two_processes(folder):
    """Each ends with half of the model in fp32 and never holds it whole. The files' pages are counted here although
    both processes share them, and the system takes them back when it needs room."""
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2 ** 20
    for mine, peak in measured(folder, "fsdp"):
        print(f"{mine:.0f} MB of shards, {files:.0f} MB of files, at most {peak:.0f} MB")
        assert 150 < mine < 220 and peak < mine + files + 50 < 2 * mine + files
