"""Other tools' own code on the same weights and the same 32 calibration images.

    git clone https://github.com/zkkli/RepQ-ViT && git clone https://github.com/GoatWu/AdaLog
    python benchmarks/peers.py repq --clone RepQ-ViT --data FOLDER
    python benchmarks/peers.py adalog --clone AdaLog --data FOLDER --gram --token-stride 16
    python benchmarks/peers.py onnxruntime --data FOLDER
    python benchmarks/peers.py deploykit --data FOLDER        # our own, on the same 32 images

FOLDER is that of ``benchmarks/accuracy.py vit``. Each width runs in a fresh process, which gives
calibration seconds, peak memory, and top-1 on all validation images paired with the float
model's. Writes ``benchmarks/results/peers.json`` and ``.md`` after each. Results of RepQ-ViT and
AdaLog are simulations: floats that only take quantised values.
"""

from __future__ import annotations

# Nothing heavy may be imported here: a process's peak memory is never less than its parent's.
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
VARIANTS = {
    "repq": ["w4a4", "w6a6", "w8a8"],
    "adalog": ["w4a4", "w3a3", "w6a6"],
    "onnxruntime": ["minmax", "minmax, all operators", "percentile", "entropy"],
    "deploykit": ["w8a8 fast", "w6a6 fast", "w4a8 fast", "w4a4 fast"],
}
TITLES = {
    "repq": "RepQ-ViT",
    "adalog": "AdaLog, calibration only",
    "onnxruntime": "ONNX Runtime static, W8A8",
    "deploykit": "deploykit",
}
SIMULATED = ("repq", "adalog")


def run_one(args: argparse.Namespace, variant: str) -> dict[str, Any]:
    """One width or variant, in this process."""
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks import peer_common as common

    torch.set_num_threads(args.threads)
    backbone = common.load_backbone(args.data)
    validation = common.validation_set(args.data, backbone, args.val_images)
    if variant == "fp32":
        return {"predictions": common.predictions(backbone.module, validation)}
    images, source = common.calibration_tensor(args.data, backbone, args.calib_images)
    watch = common.Stopwatch()
    row: dict[str, Any] = {"variant": variant, "simulation": args.peer in SIMULATED}
    row["calibration"] = source
    with tempfile.TemporaryDirectory() as folder:
        run: Any
        if args.peer == "repq":
            from benchmarks import peer_repq as repq

            run = repq.calibrated(args.clone, backbone.module, images, variant, watch)
            row["notes"] = repq.NOTES
        elif args.peer == "adalog":
            from benchmarks import peer_adalog as adalog

            first = ("patch_embed", "blocks.0.") if args.estimate else ("",)
            run, row["layer_seconds"] = adalog.calibrated(
                args.clone,
                backbone.module,
                images,
                variant,
                watch,
                memory=int(args.memory_gib * 2**30),
                gram=args.gram,
                token_stride=args.token_stride,
                only=(lambda name: name.startswith(first)) if args.estimate else None,
            )
            row["notes"] = [*adalog.NOTES, *adalog.deviations(args.gram, args.token_stride)]
            row["memory_told_gib"] = args.memory_gib
        elif args.peer == "deploykit":
            from benchmarks import peer_deploykit as ours

            file = ours.quantized_file(backbone, images, variant, Path(folder), watch)
            run = ours.runner(file, args.threads)
            row["notes"] = ours.NOTES
            row["bytes"] = file.stat().st_size
        else:
            from benchmarks import peer_onnxruntime as static

            file = static.quantized_file(backbone, images, variant, Path(folder), watch)
            run = static.runner(file, args.threads)
            row["notes"] = static.NOTES
            row["bytes"] = file.stat().st_size
        row |= watch.row()
        if not args.estimate:
            reference = json.loads(args.reference.read_text(encoding="utf-8"))["predictions"]
            found = common.predictions(run, validation)
            row |= common.accuracy_row(validation, reference, found)
    return row


def child(variant: str, reference: Path | None) -> dict[str, Any]:
    """``run_one`` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
        command += ["--child", variant, "--child-out", str(out)]
        if reference is not None:
            command += ["--reference", str(reference)]
        if subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode:
            sys.exit(f"benchmarks/peers.py: {variant} failed; its own words are above")
        row: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return row


def commit_of(clone: Path | None) -> str | None:
    """The commit a clone is at, with a mark if it has been changed."""
    if clone is None:
        return None
    git = ["git", "-C", str(clone)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    state = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"],
        capture_output=True,
        text=True,
        check=True,
    )
    return head.stdout.strip() + ("+changed" if state.stdout.strip() else "")


def environment() -> dict[str, Any]:
    """The machine and the versions."""
    from deploykit.environment import environment as found

    return found()


def markdown(results: dict[str, Any]) -> str:
    """The results of all peers as one table."""
    lines = [
        "| tool | variant | kind | top-1 | lost, points (95 %) | calibration | peak memory |",
        "|:--|:--|:--|--:|--:|--:|--:|",
    ]
    notes = []
    for peer in [name for name in TITLES if name in results]:
        entry = results[peer]
        for r in entry["rows"]:
            kind = "simulation" if r["simulation"] else "file"
            lost = f"{r['drop']:.2f} ({r['drop_low']:.2f} … {r['drop_high']:.2f})"
            time = memory = "–"
            if "calibration_seconds" in r:
                time = f"{r['calibration_seconds']:.0f} s"
                memory = f"{r['peak_rss_bytes'] / 2**30:.1f} GiB"
            lines.append(
                f"| {TITLES[peer]} | {r['variant']} | {kind} | {r['top1']:.2f} % | {lost} "
                f"| {time} | {memory} |"
            )
        first = entry["rows"][0]
        packages = entry["environment"]["packages"]
        commit = f" (commit {entry['commit'][:10]})" if entry["commit"] else ""
        notes.append(
            f"{TITLES[peer]}{commit}: {first['calibration']}; fp32 "
            f"{first['top1_original']:.2f} % of {first['images']} images; "
            f"{entry['environment']['cpu']}, {entry['threads']} threads, torch "
            f"{packages['torch']}, onnxruntime {packages['onnxruntime']}. "
            + "; ".join(dict.fromkeys(note for r in entry["rows"] for note in r.get("notes", ())))
        )
    lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=sorted(VARIANTS))
    parser.add_argument("--clone", type=Path, help="the peer's repository (repq, adalog)")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", help="widths, or calibration methods")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--calib-images", type=int, default=32, help="fewer: for a trial only")
    parser.add_argument("--val-images", type=int, help="fewer: for a trial only")
    adalog = parser.add_argument_group("adalog (see benchmarks/peer_adalog.py)")
    adalog.add_argument("--gram", action="store_true", help="same weight errors, less work")
    adalog.add_argument("--token-stride", type=int, default=1, help="a deviation, labelled as one")
    adalog.add_argument("--memory-gib", type=float, default=1.2, help="what the peer thinks it has")
    adalog.add_argument("--estimate", action="store_true", help="time the first block only")
    for hidden in ("--child", "--child-out", "--reference"):
        kind = str if hidden == "--child" else Path
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer in SIMULATED and (args.clone is None or not args.clone.is_dir()):
        parser.error(f"{args.peer} needs --clone FOLDER, its repository (see --help)")
    if args.clone is not None:
        args.clone = args.clone.resolve()
    return args


def estimate(variants: list[str]) -> None:
    """Print what a whole AdaLog calibration would take, from its first block."""
    for variant in variants:
        row = child(variant, None)
        del row["environment"]
        seconds = row["layer_seconds"]
        block = sum(s for name, s in seconds.items() if name.startswith("blocks.0."))
        print(json.dumps(row, indent=2))
        print(f"{variant}: {block:.0f} s a block, {12 * block / 60:.0f} min for 12, and the rest")


def main() -> None:
    args = arguments()
    if args.child:
        row = run_one(args, args.child)
        row["environment"] = environment()
        args.child_out.write_text(json.dumps(row), encoding="utf-8")
        return
    variants = args.variants or VARIANTS[args.peer]
    if args.estimate:
        estimate(variants)
        return
    entry: dict[str, Any] = {"commit": commit_of(args.clone), "threads": args.threads, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "fp32.json"
        reference.write_text(json.dumps(child("fp32", None)), encoding="utf-8")
        for variant in variants:
            row = child(variant, reference)
            entry["environment"] = row.pop("environment")
            entry["rows"].append(row)
            print(json.dumps(entry["rows"][-1]), flush=True)
            save(args, entry)


def save(args: argparse.Namespace, entry: dict[str, Any]) -> None:
    """Write the results; after each row, for the next may take hours.

    Rows of other variants stay if they were made on the same machine from the same code.
    """
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / "peers.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    old = results.get(args.peer, {})
    kept = []
    if all(old.get(key) == value for key, value in entry.items() if key != "rows"):
        done = {row["variant"] for row in entry["rows"]}
        kept = [row for row in old["rows"] if row["variant"] not in done]
    results[args.peer] = entry | {"rows": [*kept, *entry["rows"]]}
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (args.results / "peers.md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
