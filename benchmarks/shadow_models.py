"""Attacks with many models of one kind: is a single forgotten instance distinguishable from one that was never there?

    python benchmarks/shadow_models.py --models 64 --out docs/results/shadow_models.json

Each model is trained on the digits without a random half of some candidates. It then forgets half of the candidates
that it was trained on; an oracle is trained without this half. So for each candidate there are models that forgot it
and models that were never trained on it. One model after another is then attacked with all others as references: U-LiRA
(a pair of normal distributions of margins for each candidate), RMIA, and the loss alone. Guessing gives 50 %, and the
results of oracles show the effect of chance. The distributions of margins of models that forgot and of oracles are
compared instance by instance (Kolmogorov-Smirnov, KL). The floor compares oracles where a candidate was left out late
with oracles where it was never in. Logits are saved after each model, and the next run resumes. The last line printed
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from munkey.audit import (
    attack,
    kl_of_margins,
    kolmogorov_smirnov,
    lira_scores,
    margins,
    membership_scores,
    rmia_scores,
)
from treediff.core.checkpoint import read_checkpoint, save_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # for what they share
from unlearning.models import Bench
from unlearning.task import Task

#: Settings of methods after the fact; the benchmark in examples/ finds settings by trials.
SETTINGS = {"fine_tune": {"lr": 4e-3}, "scrub": {"lr": 1e-3, "rounds": 2}, "sal_un": {"lr": 1e-3, "share": 0.5}}


class Shadows:
    """Draws of candidates for each model, and logits `(models, candidates, classes)` of models and oracles."""

    def __init__(self, task: Task, args: argparse.Namespace) -> None:
        self.task, self.args = task, args
        order = torch.randperm(len(task.images), generator=torch.Generator().manual_seed(0))
        self.candidates, self.rest = order[: args.candidates], order[args.candidates :]
        draw = torch.rand(args.models, args.candidates, generator=torch.Generator().manual_seed(1)).argsort(0)
        self.never, self.gone = draw < args.models // 2, draw >= args.models * 3 // 4

    def logits(self, path: Path) -> dict[str, dict[str, Tensor]]:
        """Logits of all methods, of models that forgot and of oracles; a file keeps finished logits."""
        about = {key: str(value) for key, value in vars(self.args).items() if key not in ("work", "out")}
        found: dict[str, dict[str, list[Tensor]]] = {name: {"forgot": [], "oracle": []} for name in self.args.methods}
        if path.exists():
            saved = read_checkpoint(path)
            found = saved["logits"]
            if saved["about"] != about:
                raise SystemExit(f"{path} holds logits of other settings; name another --work")
        for number in tqdm(range(len(found[self.args.methods[0]]["oracle"]), self.args.models), desc="models"):
            known = torch.cat([self.rest, self.candidates[~self.never[number]]])
            bench = Bench(self.task, number, self.args, SETTINGS, (known, self.candidates[self.gone[number]]))
            for name, sides in found.items():  # methods after the fact begin with one model
                sides["forgot"].append(self.asked(bench.forgotten(name)[0]))
                sides["oracle"].append(self.asked(bench.fitted("plain" if name in SETTINGS else name, 1)))
            save_checkpoint(path, {"about": about, "logits": found})
        return {name: {side: torch.stack(each) for side, each in sides.items()} for name, sides in found.items()}

    @torch.no_grad()
    def asked(self, model: nn.Module) -> Tensor:
        task, own = self.task, self.candidates
        logits: Tensor = model.eval()(task.images[own], keys=task.keys[own])
        return logits.float()

    def attacks(self, logits: Tensor) -> dict[str, Any]:
        """Each model attacked with the others as references: mean and deviation of areas, in percent."""
        labels = self.task.labels[self.candidates]
        margin, loss = margins(logits, labels), membership_scores(logits, labels)["loss"]
        areas: dict[str, list[float]] = {"U-LiRA": [], "RMIA": [], "loss": []}
        found: list[float] = []
        for number in range(len(logits)):
            others, never = torch.arange(len(logits)) != number, self.never[number]
            inside = margin[others].masked_fill(~self.gone[others], torch.nan)
            outside = margin[others].masked_fill(~self.never[others], torch.nan)
            scores = {
                "U-LiRA": lira_scores(margin[number], inside, outside, shared_variance=True),
                "RMIA": rmia_scores(loss[number], loss[others], loss[number, never], loss[others][:, never]),
                "loss": loss[number],
            }
            for name, score in scores.items():
                told = attack(score[self.gone[number]], score[self.never[number]], resamples=1)
                areas[name].append(100 * told.auc)
                if name == "U-LiRA":
                    found.append(100 * told.tpr)
        about = {name: (statistics.mean(each), statistics.stdev(each)) for name, each in areas.items()}
        return {**about, "U-LiRA, true at 1 % false": (statistics.mean(found), statistics.stdev(found))}

    def distances(self, forgot: Tensor, oracle: Tensor) -> dict[str, float]:
        """Mean distances over candidates, between margins of models that forgot one and of oracles without it."""
        labels, found = self.task.labels[self.candidates], dict.fromkeys(("KS", "KS floor", "KL", "KL floor"), 0.0)
        ours, theirs = margins(forgot, labels), margins(oracle, labels)
        for n in range(len(labels)):
            gone, never = self.gone[:, n], self.never[:, n]
            sides = {"": ours[gone, n], " floor": theirs[gone, n]}
            for name, side in sides.items():
                pair = side[:, None], theirs[never, n][:, None]
                found[f"KS{name}"] += kolmogorov_smirnov(*pair).mean / len(labels)
                found[f"KL{name}"] += kl_of_margins(*pair, bins=5, floor=0.05).mean / len(labels)
        return found


def main() -> None:
    """All methods, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--size", type=int, help="height and width for images of a folder, if their sizes differ")
    parser.add_argument("--models", type=int, default=64, help="of each kind, 12 at least")
    parser.add_argument("--candidates", type=int, default=300)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[
            "munkey mode=paper own_token_probability=1",
            "munkey readout=transformer aggregation=ensemble neighbours=4",
            *SETTINGS,
        ],
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--effort", type=float, default=0.2)
    parser.add_argument("--encoder", default="random")
    parser.add_argument("--key-width", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("runs/shadow"), help="folder for logits")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.forget = "random:0.1"  # other sets are drawn here
    torch.set_flush_denormal(True)
    task = Task(argparse.Namespace(**{**vars(args), "out": args.work}))
    shadows = Shadows(task, args)
    results: dict[str, dict[str, Any]] = {}
    for name, logits in shadows.logits(args.work / "logits.safetensors").items():
        results[name] = {side: shadows.attacks(each) for side, each in logits.items()}
        results[name] |= shadows.distances(logits["forgot"], logits["oracle"])
    about = {"data": task.name, "models": args.models, "candidates": args.candidates, "epochs": args.epochs}
    line = json.dumps({**about, "results": results})
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
