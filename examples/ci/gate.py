"""A CI step: compress the model, and fail the job when accuracy or latency regresses.

    python examples/ci/gate.py RECIPE OUT [--baseline OLD_REPORT]

The exit code is deploykit's: 3 accuracy, 4 latency or size, 5 parity, 7 too noisy to judge.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import deploykit
from deploykit.errors import DeploykitError


def main() -> int:
    parser = argparse.ArgumentParser(description="Compress a model and judge the result.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--max-latency-ratio", type=float, default=1.0)
    args = parser.parse_args()
    try:
        report = deploykit.compress(args.recipe, out=args.out, overwrite=True)
        baseline = deploykit.load_report(args.baseline) if args.baseline else None
        report.check(
            max_drop=args.max_drop,
            max_latency_ratio=args.max_latency_ratio,
            baseline=baseline,
        )
    except DeploykitError as error:
        print(f"regression: {error}", file=sys.stderr)
        return int(error.exit_code)
    print((args.out / "report.md").read_text(encoding="utf-8"))
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
