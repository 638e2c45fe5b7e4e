"""A recovery that is started once per process (by torchrun); each writes what it got.

Arguments: a folder.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from deploykit.prune.recover import recover
from tests.recovery import QUICK, Waves, cnn, damaged, weights


def main() -> None:
    place, rank = Path(sys.argv[1]), os.environ.get("RANK", "alone")
    options = replace(QUICK, batch_size=8, epochs=1)
    recovered, record = recover(
        damaged(cnn()), cnn(), options, Waves(64), checkpoint=place / "checkpoint"
    )
    save_file(weights(recovered), place / f"{rank}.safetensors")
    (place / f"{rank}.json").write_text(json.dumps(record.details))


if __name__ == "__main__":
    main()
