"""Forget instances of a trained classifier, at once and without their data, and report the changes.

    python examples/train_munkey.py                                   # first train the classifier
    python examples/forget.py --label 7                               # all of a class that are not permanent
    python examples/forget.py --ids 3 14 15
    python examples/forget.py --file ids.txt --out runs/forgotten     # an id a line

With `--beside`, the table also has a model that was trained without these instances. The receipt is written as JSON;
the last line printed is one JSON object with the results.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from munkey import KeyMemoryTransformer, pathway_accuracies
from munkey.audit import erasure_report
from treediff.data import ImageDataset, load_dataset


def chosen(model: KeyMemoryTransformer, args: argparse.Namespace) -> list[int]:
    """The ids to forget."""
    store = model.memory.store
    if args.ids is not None:
        return list(args.ids)
    if args.file is not None:
        return [int(line) for line in args.file.read_text().split()]
    there = slice(0, store.used)
    of_label = store.labels[there] == args.label
    if of_label.any() and store.permanent[there][of_label].all():
        raise SystemExit(f"all instances of class {args.label} are permanent, and cannot be forgotten")
    return sorted(set(store.ids[there][of_label & ~store.permanent[there]].tolist()))


def twins(model: KeyMemoryTransformer, ids: list[int], threshold: float) -> dict[int, int]:
    """The nearest instance that stays, for each instance that is forgotten but has a near duplicate."""
    gone, found = set(ids), model.find_near_duplicates(ids, threshold)
    staying = {own: [other for other, _ in others if other not in gone] for own, others in found.items()}
    return {own: others[0] for own, others in staying.items() if others}


def measure(model: KeyMemoryTransformer, data: ImageDataset, groups: dict[str, torch.Tensor]) -> dict[str, object]:
    """Accuracies on the test set and on some training images."""
    assert data.train_labels is not None and data.test_labels is not None
    found: dict[str, object] = {"test": asdict(pathway_accuracies(model, data.test_images[:], data.test_labels))}
    for name, ids in groups.items():
        found[name] = asdict(pathway_accuracies(model, data.train_images[ids], data.train_labels[ids]))
    return found


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Accuracies in percent, as a table of text."""
    lines = [f"{'':24s}" + "".join(f"{group:>12s}" for group in next(iter(results.values())))]
    for name, groups in results.items():
        for pathway in ("full", "input", "memory"):
            numbers = "".join(f"{100 * groups[group][pathway]:12.1f}" for group in groups)
            lines.append(f"{name + ', ' + pathway:24s}{numbers}")
    return "\n".join(lines)


def main() -> None:
    """Load, forget, save, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/munkey/model.safetensors"))
    parser.add_argument("--data", default="digits", help="data that the classifier was trained on, to measure")
    parser.add_argument("--size", type=int, help="height and width for images of a folder, if their sizes differ")
    parser.add_argument("--out", type=Path, default=Path("runs/forgotten"), help="folder for the model and the receipt")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--ids", type=int, nargs="+")
    which.add_argument("--file", type=Path, help="an id a line")
    which.add_argument("--label", type=int, help="all instances of a class")
    parser.add_argument(
        "--missing", default="raise", choices=("raise", "ignore"), help="what to do with ids that are not there"
    )
    parser.add_argument("--twins", type=float, default=0.99, help="least similarity of a near duplicate")
    parser.add_argument("--beside", type=Path, help="a model trained without these instances")
    args = parser.parse_args()

    data, model = load_dataset(args.data, size=args.size), KeyMemoryTransformer.load(args.model).eval()
    training = args.model.with_name("results.json")  # of train_munkey.py
    if training.exists() and (own := json.loads(training.read_text()).get("data", data.name)) != data.name:
        parser.error(f"the classifier was trained on {own!r}; name that with --data, found {data.name!r}")
    args.out.mkdir(parents=True, exist_ok=True)
    store = model.memory.store
    ids = [i for i in chosen(model, args) if args.missing == "raise" or i in store]
    if not ids:
        raise SystemExit("nothing to forget: none of these are in the memory")
    rows = store.get(ids[:100])  # kept only to search for their bytes afterwards
    kept = sorted(set(store) - set(ids))
    groups = {"forgotten": torch.tensor(ids), "kept": torch.tensor(kept, dtype=torch.int64)}
    results, alike = {"before": measure(model, data, groups)}, twins(model, ids, args.twins)
    start = time.perf_counter()
    receipt = model.forget(ids)
    seconds = time.perf_counter() - start
    results["after"] = measure(model, data, groups)
    if args.beside is not None:
        results["trained without"] = measure(KeyMemoryTransformer.load(args.beside).eval(), data, groups)

    path = args.out / "model.safetensors"
    model.save(path)
    (args.out / "receipt.json").write_text(receipt.to_json() + "\n")
    report = erasure_report(rows, holders=[model], files=[args.model, path])
    left = {"before": report.found[str(args.model)], "after": report.found[str(path)]}
    left["tensors"] = report.found["tensors"]
    print(table(results))  # type: ignore[arg-type]
    print(
        f"forgot {len(receipt.forgotten)} instances in {1000 * seconds:.1f} ms; the memory is now {receipt.after[:16]}"
    )
    print(
        f"of their {report.pieces} keys and values the file held {left['before']} before, and holds {left['after']} "
        f"now; {left['tensors']} are in the model's tensors"
    )
    if alike:
        some = ", ".join(f"{own} ({other})" for own, other in list(alike.items())[:5])
        print(
            f"{len(alike)} of them have a near duplicate that stays and still answers for them: {some}"
            f"{', ...' if len(alike) > 5 else ''}; forget these, too, if they show the same thing"
        )
    about = {
        "twins": {str(own): other for own, other in alike.items()},
        "seconds": seconds,
        "rows": receipt.rows,
        "bytes": receipt.bytes,
        "found": left,
        "accuracy": results,
    }
    print(json.dumps({"data": data.name, **about}))


if __name__ == "__main__":
    main()
