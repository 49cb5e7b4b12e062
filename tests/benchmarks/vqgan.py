"""The picture tokenizer at LVM's real configuration (256 x 256 pixels, 146 million parameters), on this machine's CPU.

    python tests/benchmarks/vqgan.py [--threads 1 2] [--rounds 3] [--pictures 1]

Contenders take turns, and the best round of each counts: ours, the same convolutions alone (every input recorded, then
each convolution called on its own), `diffusers`' VQModel with the same weights (where diffusers is installed), and ours
in bf16. Prints seconds on the clock and of CPU (which a busy machine spoils less) and the ratios; codes must be equal
to those of diffusers. Weights are random and the codebook is drawn among the latents of photographs, since no released
weights are at hand. Nothing is asserted about time.
"""
import argparse
import copy
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_nb.drawing.vqgan import VQGAN
from mllm_nb.samples import photo

PHOTOS = ("coffee", "astronaut", "china", "chelsea")


def photographs(count: int) -> Tensor:
    pictures = [np.array(photo(PHOTOS[i % len(PHOTOS)]).resize((256, 256))) for i in range(count)]
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1) / 255


def our_model(pixels: Tensor) -> VQGAN:
    "Random weights; a codebook with mean and deviation of the latents."
    torch.manual_seed(0)
    model = VQGAN().eval()
    with torch.inference_mode():
        latents = model.latents(pixels).movedim(1, -1).flatten(0, 2)
        model.quantize.embedding.weight.copy_(latents.mean(0) + latents.std(0) * torch.randn(8192, 64))
    return model


def their_names(name: str) -> str:
    "Our name of a weight, in diffusers' words."
    for ours, theirs in ((".block.", ".resnets."), ("nin_shortcut", "conv_shortcut"), ("norm_out", "conv_norm_out"),
                         ("downsample.", "downsamplers.0."), ("upsample.", "upsamplers.0."), ("encoder.down.", "encoder.down_blocks."),
                         (".mid.block_1", ".mid_block.resnets.0"), (".mid.block_2", ".mid_block.resnets.1")):
        name = name.replace(ours, theirs)
    if name.startswith("decoder.up."):   # stored the other way round
        level, rest = name.removeprefix("decoder.up.").split(".", 1)
        name = f"decoder.up_blocks.{4 - int(level)}.{rest}"
    return name


def diffusers_model(ours: VQGAN):
    "The same network of diffusers, or None where it is not installed."
    try:
        from diffusers import VQModel
    except ImportError:
        return None
    model = VQModel(3, 3, ("DownEncoderBlock2D",) * 5, ("UpDecoderBlock2D",) * 5, (128, 256, 256, 512, 768), 2,
                    latent_channels=64, num_vq_embeddings=8192, vq_embed_dim=64, mid_block_add_attention=False, lookup_from_codebook=True)
    model.load_state_dict({their_names(name): value for name, value in ours.state_dict().items()})
    return model.eval()


def recorded(model: nn.Module, work: Callable[[], object]) -> list[tuple[nn.Module, Tensor]]:
    "Every convolution that `work` calls, with its input."
    calls, hooks = [], []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda module, inputs, _: calls.append((module, inputs[0].clone()))))
    work()
    for hook in hooks:
        hook.remove()
    return calls


def convolve(calls: list[tuple[nn.Module, Tensor]]) -> None:
    for module, inputs in calls:
        F.conv2d(inputs, module.weight, module.bias, module.stride, module.padding)


def race(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    "Best seconds on the clock and of CPU of each."
    best = {name: (float("inf"), float("inf")) for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            clock, used = time.perf_counter(), time.process_time()
            work()
            times = time.perf_counter() - clock, time.process_time() - used
            if number:   # the first round warms up
                best[name] = tuple(map(min, best[name], times))
    return best


def report(title: str, results: dict[str, tuple[float, float]]) -> None:
    ours = results["ours"]
    print(f"\n{title:28}{'seconds':>9}{'ours is':>9}{'CPU s':>9}{'ours is':>9}")
    for name, (clock, used) in results.items():
        print(f"{name:28}{clock:9.3f}{ours[0] / clock:8.2f}x{used:9.3f}{ours[1] / used:8.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1)
    options = parser.parse_args()
    pixels = photographs(options.pictures)
    ours = our_model(photographs(4))
    theirs, half = diffusers_model(ours), copy.deepcopy(ours).bfloat16()
    for threads in options.threads:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            measure(ours, theirs, half, pixels, options.rounds, threads)


def measure(ours: VQGAN, theirs, half: VQGAN, pixels: Tensor, rounds: int, threads: int) -> None:
    codes = ours.encode(pixels)
    encoding = {"ours": lambda: ours.encode(pixels)}
    decoding = {"ours": lambda: ours.decode(codes)}
    there, back = recorded(ours, encoding["ours"]), recorded(ours, decoding["ours"])
    encoding["convolutions alone"], decoding["convolutions alone"] = lambda: convolve(there), lambda: convolve(back)
    if theirs is not None:
        def their_codes() -> Tensor:
            return theirs.quantize(theirs.encode(pixels).latents)[2][2].reshape(codes.shape)
        grid = (len(pixels), 16, 16, 64)
        encoding["diffusers VQModel"] = their_codes
        decoding["diffusers VQModel"] = lambda: theirs.decode(codes.flatten(), force_not_quantize=True, shape=grid)
        if not torch.equal(their_codes(), codes):
            raise SystemExit(f"other codes than diffusers: {(their_codes() != codes).sum().item()} of {codes.numel()}")
    encoding["ours in bf16"], decoding["ours in bf16"] = lambda: half.encode(pixels.bfloat16()), lambda: half.decode(codes)
    report(f"encode, {threads} thread(s)", race(encoding, rounds))
    report(f"decode, {threads} thread(s)", race(decoding, rounds))
    same = (half.encode(pixels.bfloat16()) == codes).float().mean().item()
    print(f"codes of bf16 that equal those of fp32: {same:.1%}")


if __name__ == "__main__":
    main()
