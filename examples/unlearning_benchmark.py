"""Forget in every way, and compare with models that were trained without: accuracies, attacks, seconds.

    python examples/unlearning_benchmark.py --data digits --epochs 20 --out runs/unlearning          # a few minutes
    python examples/unlearning_benchmark.py --data fashion-mnist --forget random:0.1 --seeds 3 --out DIR
    python examples/unlearning_benchmark.py --data features.npz --epochs 20 --seeds 3 --out DIR     # of embed.py

Methods after the fact change a vision transformer, or a network with one hidden layer if the data are features. Each
method is first tuned, by six trials, on other seeds and on training rows held out for testing. Methods by design delete
what they stored. All are compared with a model of the same kind that was trained without the forget set (the oracle),
and with a plain network trained without it. A second oracle, of another seed, shows the gap between two oracles.

"munkey" is exact mode, in which half of the rows are permanent. `--methods "munkey mode=paper width=32"` sets how the
model is built, and `noise=1` adds noise to the gradients of its shared weights. On features, "munkey learn=trees" takes
boosted trees in place of the networks of `classify_features.py`. Every row is saved when it is complete, and the next
run does not compute it again. `DIR` gets results.json, table.md and picture.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from unlearning.models import Bench
from unlearning.report import BY_DESIGN, NAMES, one, picture, quality, table
from unlearning.task import Task

from munkey.audit import average_gap

RATES = [3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3]
#: Methods after the fact, and the settings that are tried for each.
AFTER: dict[str, list[dict[str, float]]] = {
    "fine_tune": [{"lr": lr} for lr in RATES],
    "neg_grad": [{"lr": lr} for lr in (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)],
    "neg_grad_plus": [{"lr": lr, "retain_weight": a} for lr in (1e-4, 3e-4, 1e-3) for a in (0.95, 0.99)],
    "l1_sparse": [{"lr": lr, "gamma": gamma} for lr in (3e-4, 1e-3, 3e-3) for gamma in (1e-5, 1e-4)],
    "random_labels": [{"lr": lr} for lr in RATES],
    "bad_teacher": [{"lr": lr} for lr in RATES],
    "scrub": [{"lr": lr, "rounds": rounds} for lr in (1e-4, 3e-4, 1e-3) for rounds in (1, 2)],
    "sal_un": [{"lr": lr, "share": share} for lr in (3e-4, 1e-3, 3e-3) for share in (0.1, 0.5)],
    "ssd": [{"alpha": alpha} for alpha in (1.1, 1.5, 2.0, 5.0, 10.0, 20.0)],
    "amun": [{"lr": lr, "attack_steps": 20} for lr in RATES],
}


def tune(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The settings of each method after the fact with the smallest gap to an oracle, of six; no test image is used."""
    path = args.tuned or args.out / "tuned.json"
    tried: dict[str, list[Any]] = json.loads(path.read_text()) if args.tuned or path.exists() else {}
    if missing := [name for name in AFTER if name in args.methods and name not in tried]:
        task = Task(args, holdout=args.holdout)
        bench = Bench(task, 1000, args, {})
        sets = bench.gone, bench.stay, bench.others
        oracle = task.measured(bench.fitted("plain", 1), *sets)
        for name in tqdm(missing, desc="tuning"):
            tried[name] = []
            for options in AFTER[name]:
                found = task.measured(bench.unlearned(name, options)[0], *sets)
                gap = average_gap({n: found[n] for n in NAMES}, {n: oracle[n] for n in NAMES})
                tried[name].append([gap, options])
            path.write_text(json.dumps(tried))
    return {name: min(trials, key=lambda trial: trial[0])[1] for name, trials in tried.items()}


def main() -> None:
    """Tune, then all methods of all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, mnist, or a path")
    parser.add_argument("--size", type=int, help="height and width for images of a folder, if their sizes differ")
    parser.add_argument(
        "--forget", default="random:0.1", help="random:SHARE, class, cluster:SHARE or low-density:SHARE"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=[*AFTER, *BY_DESIGN], help="all, if not given")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--effort", type=float, default=0.2, help="length of methods after the fact, in trainings")
    parser.add_argument("--relearn", type=int, default=20, help="steps of relearning what was forgotten")
    parser.add_argument("--holdout", type=int, default=200, help="training images to tune on in place of test images")
    parser.add_argument("--encoder", default="random", help="random, efficientnet, or a file of train_encoder.py")
    parser.add_argument("--key-width", type=int, default=256, help="width of random keys")
    parser.add_argument("--tuned", type=Path, help="tuned.json of another run, to take over and add to")
    parser.add_argument("--out", type=Path, default=Path("runs/unlearning"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    settings = ("data", "forget", "epochs", "effort", "holdout", "encoder", "key_width")
    about: dict[str, Any] = {name: Path(str(getattr(args, name))).name for name in settings}  # of files, no folders
    about |= {"size": args.size} if args.size else {}
    path, rows = args.out / "results.json", []
    if path.exists():
        before = json.loads(path.read_text())
        rows = before.pop("rows")
        if before != about:
            raise SystemExit(f"{path} holds results of other settings; name another folder")
    path.write_text(json.dumps({**about, "rows": rows}) + "\n")
    tuned, task = tune(args), Task(args)
    kinds = dict.fromkeys("plain" if name in AFTER else name for name in args.methods)
    wanted = [f"{kind}: before" for kind in kinds] + [f"{kind}: retrained" for kind in kinds if kind != "sisa"]
    wanted += [f"{kind}: retrained again" for kind in kinds if kind == "plain" or kind.startswith("munkey mode=paper")]
    for seed in range(args.seeds):
        bench = Bench(task, seed, args, tuned)
        known = {row["method"] for row in rows if row["seed"] == seed}
        for method in tqdm([name for name in [*wanted, *args.methods] if name not in known], desc=f"seed {seed}"):
            rows.append({"seed": seed, "method": method, **bench.row(method)})
            path.write_text(json.dumps({**about, "rows": rows}) + "\n")
    tables = "\n\n".join(filter(None, (table(rows), quality(rows), one(rows))))
    (args.out / "table.md").write_text(tables + "\n")
    picture(rows, args.out / "picture.png")
    print(tables)
    print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
