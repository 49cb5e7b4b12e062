"Shared by the tests: where the checkout is, and a browser."
import os
import shutil
import sys
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("MPLBACKEND", "agg")  # figures without a screen
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the same examples in every run, unless new ones are asked for: HYPOTHESIS_PROFILE=search
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def decided_decoder(**config):
    "A small random decoder with larger weights: no two next words are as likely to the last digit."
    import torch
    from mllm_nb.language.decoder import Decoder, DecoderConfig
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**{"num_hidden_layers": 2, "num_attention_heads": 2} | config)).eval()
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    return decoder


def browser_path() -> str | None:
    "A Chromium of this machine: the variable CHROMIUM, or the first known name on the PATH."
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return os.environ.get("CHROMIUM") or next((path for path in map(shutil.which, names) if path), None)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    "A headless Chromium with a profile of its own; tests that need it are skipped where there is none."
    path = browser_path()
    if path is None:
        pytest.skip("no Chromium found: install it (apt-get install chromium) or name it in CHROMIUM")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
    with api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=path, headless=True, args=flags)
        context.set_default_timeout(60_000)
        yield context
        context.close()
