"The plan follows from the facts, is measured once, and says why."
import re
import time

import pytest
import torch

from mllm_nb import device
from mllm_nb.device import DeviceFacts, DevicePlan, decide, describe_device, device_plan, look_at


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.delenv("MLLM_NB_DTYPE", raising=False)
    device_plan.cache_clear()
    yield
    device_plan.cache_clear()


@pytest.mark.parametrize("facts, dtype, attention, scaler", [
    (DeviceFacts("cpu"), torch.float32, "sdpa", False),
    (DeviceFacts("cpu", gain=1.1), torch.float32, "sdpa", False),
    (DeviceFacts("cpu", gain=2.0), torch.bfloat16, "plain", False),
    (DeviceFacts("cuda", (7, 5)), torch.float16, "sdpa", True),
    (DeviceFacts("cuda", (8, 0)), torch.bfloat16, "sdpa", False),
    (DeviceFacts("cuda", (9, 0)), torch.bfloat16, "sdpa", False),
    (DeviceFacts("mps"), torch.float32, "sdpa", False),
    (DeviceFacts("xla"), torch.bfloat16, "plain", False),
])
def test_decisions(facts, dtype, attention, scaler):
    plan = decide(facts)
    assert (plan.device, plan.dtype, plan.attention, plan.scaler) == (facts.kind, dtype, attention, scaler)
    assert plan.why


def test_a_cpu_without_the_instructions_is_not_measured(monkeypatch):
    monkeypatch.setattr(device, "cpu_multiplies_bf16", lambda: False)
    monkeypatch.setattr(device, "bf16_gain", lambda: pytest.fail("measured"))
    assert device_plan("cpu").dtype == torch.float32


def test_measured_quickly_and_once(monkeypatch):
    device.bf16_gain.cache_clear()
    start = time.process_time()
    plan = device_plan("cpu")
    assert time.process_time() - start < 2   # a few milliseconds on an idle machine
    monkeypatch.setattr(device, "look_at", lambda name: pytest.fail("looked twice"))
    assert device_plan("cpu") is plan


def test_a_t4_as_torch_sees_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: (7, 5))
    assert device_plan() == DevicePlan("cuda", torch.float16, "sdpa", True, device_plan().why)
    assert device_plan("cuda:1").device == "cuda:1"


def test_precision_can_be_fixed(monkeypatch):
    monkeypatch.setattr(device, "bf16_gain", lambda: pytest.fail("measured"))
    monkeypatch.setenv("MLLM_NB_DTYPE", "bfloat16")
    assert (device_plan("cpu").dtype, device_plan("cpu").attention) == (torch.bfloat16, "plain")
    device_plan.cache_clear()
    monkeypatch.setenv("MLLM_NB_DTYPE", "int8")
    with pytest.raises(ValueError, match="MLLM_NB_DTYPE: found 'int8', expected one of"):
        device_plan("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:7", ""])
def test_missing_devices_are_named(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device: found {name!r}, expected one of"):
        look_at(name)


def test_autocast_only_where_it_helps():
    for facts, expected in ((DeviceFacts("cpu"), torch.float32), (DeviceFacts("cpu", gain=3.0), torch.bfloat16)):
        with decide(facts).autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


def test_description_for_the_doctor():
    facts = describe_device("cpu")
    assert facts["device"] == "cpu" and facts["name"] and facts["why"]
    assert facts["versions"]["torch"] == torch.__version__ and facts["memory_gib"].get("total", 1) > 0
    assert device.version_of("no-such-package") is None


@pytest.mark.parametrize("change, said", [
    ({"kind": 3}, "DeviceFacts.kind: found 3, expected a text"), ({"gain": "1"}, "found '1', expected a number"),
    ({"gain": float("nan")}, "found nan, expected a number"), ({"gain": True}, "found True, expected a number"),
    ({"gain": -1.0}, "found -1.0, expected more than 0"),
    ({"capability": (8,)}, "expected a list of 2 whole numbers"), ({"capability": (8, 1.5)}, "expected a list of 2 whole numbers"),
    ({"capability": [8, 0]}, "expected a list of 2 whole numbers"), ({"capability": (8, -1)}, "expected at least 0")])
def test_settings_of_another_kind_are_named(change, said):
    device.check_settings(DeviceFacts("cpu", gain=10 ** 400), ["gain"], ["capability"])
    facts = DeviceFacts(**{"kind": "cpu", **change})
    with pytest.raises(ValueError, match=re.escape(said)):
        device.check_settings(facts, ["gain"], ["capability"])
