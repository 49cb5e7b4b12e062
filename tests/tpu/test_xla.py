"The XLA lane, in an environment of its own (make test-tpu): the same curve on one and on four virtual devices."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch_xla", reason="runs in .venv-tpu: make test-tpu")


def curve(device: str, world: int, *lengths: int) -> dict:
    command = [sys.executable, Path(__file__).with_name("curve.py"), device, str(world), *map(str, lengths)]
    env = os.environ | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(world), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return curve("cpu", 1)["losses"]


@pytest.mark.parametrize("devices", [1, 4])
def test_the_curve_of_a_processor(devices, plain):
    found = curve("xla", devices)
    print(devices, "devices, programs compiled after each step:", found["compiled"])
    assert max(abs(a - b) for a, b in zip(found["losses"], plain, strict=True)) < 1e-5
    assert found["compiled"][-1] == found["compiled"][2], "steps of one shape must not be compiled again"


def test_one_more_shape_is_one_more_compilation():
    "Rows of 192 and of 224 tokens in turn: each is compiled, then neither again."
    compiled = curve("xla", 1, 192, 224)["compiled"]
    print("two shapes in turn, programs compiled after each step:", compiled)
    assert compiled[-1] == compiled[3]
