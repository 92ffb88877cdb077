"""Time the U-Net beside diffusers and denoising-diffusion-pytorch: training step, reverse step, DDIM, memory.

    pip install diffusers denoising-diffusion-pytorch
    python benchmarks/unet_step.py --out docs/results/unet_step.json

For each peer our network has about the same parameters and arithmetic (both within 5 %, as counted by PyTorch on a
forward pass), for the same images. Attention is at the same resolutions, and always in the middle. One peer also has
linear attention at every level, which our network lacks. Channels are multiples of 16 in all networks. Both networks
run alternately in one process; times are medians, ratios are medians over the rounds. Each network runs in its fastest
mode: bfloat16 autocast, with or without channels_last as the layout of maps, whichever was faster in a first try.
Memory is read in a separate process for each network (from /proc, so on Linux). Run nothing else at the same time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from treediff import EMA
from treediff.diffusion import DDIMSampler, LinearSchedule, UNet, uniform

SIZE = 32
Forward = Callable[[nn.Module, Tensor, Tensor], Tensor]


def diffusers_unet() -> nn.Module:
    from diffusers import UNet2DModel

    network: nn.Module = UNet2DModel(  # type: ignore[assignment]
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(64, 128, 128, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
    )
    return network


def lucidrains_unet() -> nn.Module:
    # Its package needs torchvision for data only.
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.transforms", "torchvision.utils"):
            module = sys.modules[name] = types.ModuleType(name)
            module.Compose = module.transforms = module.utils = module  # type: ignore[attr-defined]
    from denoising_diffusion_pytorch import Unet

    # Linear attention at every level but the last is part of this network; its own option for fast attention is on.
    return Unet(dim=64, dim_mults=(1, 2, 2, 2), channels=1, flash_attn=True)


def ours(width: int, *multipliers: int, attention: tuple[int, ...] = ()) -> Callable[[], nn.Module]:
    return lambda: UNet(
        1, 1, size=SIZE, width=width, multipliers=multipliers, blocks=2, embedding=64, attention=attention
    )


PEERS: dict[str, tuple[Callable[[], nn.Module], Forward]] = {
    "diffusers": (diffusers_unet, lambda net, x, t: net(x, 1000 * t).sample),
    "denoising-diffusion-pytorch": (lucidrains_unet, lambda net, x, t: net(x, 1000 * t)),
}
OURS = {
    "diffusers": ours(16, 4, 9, 8, 8),
    "denoising-diffusion-pytorch": ours(32, 2, 4, 3, 4, attention=(4,)),
}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Forward]] = {
    **PEERS,
    **{f"ours beside {peer}": (build, lambda net, x, t: net(x, t)) for peer, build in OURS.items()},
}


def size_of(name: str) -> dict[str, float]:
    """Parameters, and GFLOP per image of a forward pass, counted without running anything."""
    build, forward = NETWORKS[name]
    with torch.device("meta"):
        network = build()
        with FlopCounterMode(display=False) as counter:
            forward(network, torch.zeros(1, 1, SIZE, SIZE), torch.zeros(1))
    return {
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "gflop": counter.get_total_flops() / 1e9,
    }


class Runner:
    """One network in one mode."""

    def __init__(self, name: str, batch: int, channels_last: bool) -> None:
        build, self.forward = NETWORKS[name]
        layout = torch.channels_last if channels_last else torch.contiguous_format
        torch.manual_seed(0)
        self.network: nn.Module = build().to(memory_format=layout)  # type: ignore[call-overload, unused-ignore]
        self.x = torch.randn(batch, 1, SIZE, SIZE).to(memory_format=layout)
        self.t = torch.rand(batch)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-4, fused=True)
        self.ema = EMA(self.network)

    def train(self) -> None:
        """Forward, backward, clipped gradients, Adam, moving average."""
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.forward(self.network, self.x, self.t).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update()

    @torch.no_grad()
    def denoise(self) -> Tensor:
        """The network's part of a reverse step."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.forward(self.network, self.x, self.t)

    def ddim(self, steps: int) -> None:
        """A whole chain; the same sampler for all."""
        DDIMSampler()(self, self.x, uniform(self.schedule, steps))

    schedule = LinearSchedule()

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        """The denoiser for a sampler; the output of an untrained network serves as well."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.forward(self.network, x_t, torch.full((len(x_t),), t)).float()


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def best_mode(name: str, batch: int) -> bool:
    """Return whether channels_last is the faster layout for training, tried alternately a few times."""
    runners = {layout: Runner(name, batch, layout) for layout in (False, True)}
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(4):
        for layout, runner in runners.items():
            took = seconds(runner.train)
            if turn:
                times[layout].append(took)
    return statistics.median(times[True]) < statistics.median(times[False])


def pair(peer: str, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """A peer and our network beside it."""
    names = {"peer": peer, "ours": f"ours beside {peer}"}
    layouts = {who: best_mode(name, batch) for who, name in names.items()}
    runners = {who: Runner(name, batch, layouts[who]) for who, name in names.items()}
    tasks = ("train", "denoise")
    times: dict[str, list[float]] = {f"{who} {task}": [] for who in names for task in tasks}
    for turn in range(rounds + 1):
        for task in tasks:
            for who, runner in runners.items():
                took = seconds(getattr(runner, task))
                if turn:
                    times[f"{who} {task}"].append(took)
    chains: dict[str, list[float]] = {f"{who} ddim": [] for who in names}
    for _ in range(2):
        for who, runner in runners.items():
            chains[f"{who} ddim"].append(seconds(lambda runner=runner: runner.ddim(steps)))  # type: ignore[misc]
    result: dict[str, Any] = {"peer_name": peer, "batch": batch, "ddim_steps": steps}
    for who, name in names.items():
        own = {"channels_last": layouts[who], **size_of(name), "peak_mib": memory(name, batch, layouts[who])}
        own |= {f"{task}_s": statistics.median(times[f"{who} {task}"]) for task in tasks}
        own["ddim_images_per_s"] = batch / statistics.median(chains[f"{who} ddim"])
        result[who] = own
    for task in tasks:
        turns = zip(times[f"peer {task}"], times[f"ours {task}"], strict=True)
        result[f"{task}_times_faster"] = statistics.median(theirs / own for theirs, own in turns)
    turns = zip(chains["peer ddim"], chains["ours ddim"], strict=True)
    result["ddim_times_faster"] = statistics.median(theirs / own for theirs, own in turns)
    return result


def memory(name: str, batch: int, channels_last: bool) -> int:
    """Peak resident MiB of a process that only trains this network for two steps."""
    command = [sys.executable, __file__, "--memory", name, str(batch), str(int(channels_last))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    """All peers, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ddim-steps", type=int, default=50)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if args.memory:
        name, batch, layout = args.memory
        runner = Runner(name, int(batch), bool(int(layout)))
        for _ in range(2):
            runner.train()
        # Not getrusage, in which a new process begins with the peak of the one that started it.
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) // 1024)
        return
    rows = []
    for peer in args.peers:
        rows.append(pair(peer, args.batch, args.rounds, args.ddim_steps))
        print(json.dumps(rows[-1]), flush=True)
        result = {"rows": rows, "threads": torch.get_num_threads(), "torch": torch.__version__}
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
