"""Run every benchmark of speed and write one table, beside peers and beside the last record.

    python benchmarks/record.py                                      # all; build/bench/speed.md
    python benchmarks/record.py --only store unet                    # some of them
    python benchmarks/record.py --record docs/results                # keep it as the record to compare with

The benchmarks run one after another, each in a separate process. A benchmark whose result is in --out already is not
run again, so an interrupted record can be resumed. Run nothing else at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from treediff.core.cpu import has_fast

HERE = Path(__file__).parent
_DATABASES = {"sqlite": "SQLite", "sqlite wal": "SQLite, WAL", "lmdb": "LMDB"}
_RANKS = ("-m", "torch.distributed.run", "--nproc-per-node")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        what: the operation that is timed.
        ms: milliseconds.
        peer: the operation that it is compared with in the same run.
        faster: time of the peer over time of the operation.
    """

    what: str
    ms: float
    peer: str
    faster: float


def treevae(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["rows"]:
        what = f"TreeVAE, {row['kind']} latents, a step of 256 images, {row['leaves']} leaves"
        yield Row(what, row["step_ms"], "the plain loop over nodes", row["times_faster_than_naive"])
        if row["leaves"] == 32:
            yield Row(what, row["step_ms"], "two leaves", 1 / row["times_two_leaves"])


def unet(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["rows"]:
        for task, what in (("train", "a training step"), ("denoise", "a call")):
            name = f"U-Net, {what} of {row['batch']} images"
            yield Row(name, 1000 * row["ours"][f"{task}_s"], row["peer_name"], row[f"{task}_times_faster"])
        ours = 1000 * row["batch"] / row["ours"]["ddim_images_per_s"]
        name = f"U-Net, {row['ddim_steps']} steps of DDIM, {row['batch']} images"
        yield Row(name, ours, row["peer_name"], row["ddim_times_faster"])


def store(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["searching"]:
        what = f"search, {row['queries']} of {row['rows']:,} x {row['width']} ({row['keys']})"
        yield Row(what, 1000 * row["ours"], "faiss", row["times faster"])
    for row in found["forgetting"]:
        what = f"forget {row['forgotten']:,} of {row['rows']:,}, in"
        yield Row(f"{what} memory", 1000 * row["memory"], "faiss, in memory", row["faiss"] / row["memory"])
        for peer in (peer for peer in _DATABASES if peer in row):
            yield Row(f"{what} a file", 1000 * row["file"], _DATABASES[peer], row[peer] / row["file"])
    for row in found.get("opening", ()):
        for peer in (peer for peer in _DATABASES if peer in row):
            yield Row(f"open {row['rows']:,} rows", 1000 * row["ours"], _DATABASES[peer], row[peer] / row["ours"])
    keys = found.get("keys")
    if keys:
        for peer in ("batches of 64", "one at a time"):
            yield Row("a key of EfficientNet-Lite0", 1000 * keys["keys"], peer, keys[peer] / keys["keys"])
    for name in ("step", "inference"):
        own, without = (found["model"][key] for key in (name, f"{name} without memory"))
        yield Row(f"munkey, {name}", 1000 * own, "without memory", without / own)
    if (exact := found["model"].get("inference, exact mode")) is not None:
        without = found["model"]["inference without memory"]
        yield Row("munkey, inference, exact mode", 1000 * exact, "without memory", without / exact)


def requests(found: dict[str, Any]) -> Iterator[Row]:
    training, count = found["requests"]["training"], found["instances"]
    for place in ("in memory", "in a file"):
        median = found["requests"][place]["median"]
        yield Row(f"one deletion of {count:,}, {place}", 1000 * median, "training again", training / median)


def distributed(found: dict[str, Any]) -> Iterator[Row]:
    one, two = found["1"], found["2"]
    for name, rate in two["images a second"].items():
        yield Row(f"{name}, an image, 2 processes", 1000 / rate, "1 process", rate / one["images a second"][name])
    for name, row in two["store"].items():
        alone, what = one["store"][name]["seconds"], f"{name} of 1,000,000 x 128, 2 processes"
        yield Row(what, 1000 * row["seconds"], "1 process", alone / row["seconds"])


@dataclass(frozen=True)
class Benchmark:
    """Commands, the reader of their result, and whether each process has one thread, as in the recorded results."""

    commands: tuple[tuple[str, ...], ...]
    read: Callable[[dict[str, Any]], Iterator[Row]]
    one_thread: bool = False


BENCHMARKS = {
    "treevae": Benchmark((("treevae_step.py", "--leaves", "2", "10", "32", "--rounds", "7"),), treevae),
    "unet": Benchmark((("unet_step.py", "--peers", "diffusers"),), unet),
    "store": Benchmark((("store.py", "--rounds", "7"),), store),
    "requests": Benchmark((("deletion_requests.py",),), requests, one_thread=True),
    "distributed": Benchmark(
        (
            (*_RANKS, "1", "distributed.py", "--rounds", "5"),
            (*_RANKS, "2", "distributed.py", "--rounds", "5"),
        ),
        distributed,
        one_thread=True,
    ),
}


def run(name: str, folder: Path) -> Path:
    """The file with the result of a benchmark, which runs unless the file is there."""
    benchmark, path, partial = BENCHMARKS[name], folder / f"{name}.json", folder / f"{name}.partial.json"
    if not path.exists():
        partial.unlink(missing_ok=True)
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if benchmark.one_thread else {})
        for command in benchmark.commands:
            parts = [str(HERE / part) if part.endswith(".py") else part for part in command]
            print(f"{name}: {' '.join(command)}", flush=True)
            whole = [sys.executable, *parts, "--out", str(partial)]
            subprocess.run(whole, check=True, stdout=subprocess.DEVNULL, env=environment)
        partial.rename(path)
    return path


def machine() -> str:
    """The hardware, and torch, in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    fast = [name for name, dtype in (("bfloat16", torch.bfloat16), ("bytes", torch.int8)) if has_fast(dtype)]
    able = f"multiplies {' and '.join(fast)}" if fast else "has no fast low precision"
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return f"{model}, {torch.get_num_threads()} threads, {able}; {accelerator}; torch {torch.__version__}"


NOTHING: dict[str, Any] = {"machine": "there is none", "rows": []}
PAGE = """# Speed

    make bench

{machine}.

Times are medians. An operation and the operation beside it ran alternately in the same run, with two exceptions:
training again ran once, and one process ran before two. A ratio above 1 is faster. The last column is the same ratio in
the previous record ({last}).
Raw numbers are in `speed.json`; `python benchmarks/record.py --record docs/results` keeps new numbers as the record.

{table}
"""


def _short(number: float) -> str:
    """Three significant digits."""
    return f"{float(f'{number:.3g}'):,g}"


def table(rows: list[Row], before: dict[tuple[str, str], Row]) -> str:
    """Markdown: times, ratios to the peers, and the ratios of the last record."""
    lines = ["| what | ms | beside | times as fast | last record |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        last = before.get((row.what, row.peer))
        cells = [row.what, _short(row.ms), row.peer, _short(row.faster), "" if last is None else _short(last.faster)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(BENCHMARKS), choices=list(BENCHMARKS))
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--last", type=Path, default=Path("docs/results/speed.json"), help="the last record")
    parser.add_argument("--record", type=Path, help="a folder to keep table and numbers in")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    last = json.loads(args.last.read_text()) if args.last.exists() else NOTHING
    before = [Row(**row) for row in last["rows"]]
    rows: list[Row] = []
    for name in args.only:
        rows += BENCHMARKS[name].read(json.loads(run(name, args.out).read_text()))
    ratios = table(rows, {(row.what, row.peer): row for row in before})
    text = PAGE.format(machine=machine(), last=last["machine"], table=ratios)
    (args.out / "speed.md").write_text(text)
    (args.out / "speed.json").write_text(json.dumps({"machine": machine(), "rows": [asdict(r) for r in rows]}) + "\n")
    print(text)
    if args.record:
        for name in ("speed.md", "speed.json"):
            shutil.copy(args.out / name, args.record / name)


if __name__ == "__main__":
    main()
