"""Copy the committed results into the README, between its two marks.

    python benchmarks/readme.py

``tests/test_examples.py`` fails when the README says anything else than ``benchmarks/results``.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- results: python benchmarks/readme.py -->", "<!-- /results -->"
TITLES = {
    "demo": "The demo: SHViT-S1, Fashion-MNIST, 112 px (`make demo` runs its first line)",
    "vit": "A real ViT-S/14 at 168 px, fine-tuned from DINOv2, on Imagenette",
    "efficientnet": "EfficientNet-Lite0, 1000 classes, on 650 ImageNet validation images",
    "prune_vit": "Smaller first: the same ViT, its tokens merged before it is quantised",
    "peers": "Other tools on the same weights and the same 32 calibration images",
    "ladder": "What each ingredient adds: W4A4 on the real ViT",
    "growth": "What quantising costs",
    "prune_width": "Pruned to half the cost, against narrow from the start",
    "gpu": "On a GPU: 8 bits, 2:4 zeros, and both",
    "prune_families": "Every family pruned, sparse and merged: saved, loaded, exported",
    "shvit_s4": "SHViT-S4 at 256 px, untrained here: size and speed only",
}


def with_results(readme: str) -> str:
    """The README with what is in ``benchmarks/results`` between the marks."""
    before, _, rest = readme.partition(START)
    after = rest.partition(END)[2]
    parts = [START]
    for suite, title in TITLES.items():
        file = RESULTS / f"{suite}.md"
        if file.exists():
            parts += [f"**{title}**", file.read_text(encoding="utf-8").strip()]
    return before + "\n\n".join([*parts, END]) + after


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_results(path.read_text(encoding="utf-8")), encoding="utf-8")
