"""Parts of `python bench.py gpu` on the null GPU, at the sizes of its dry run. Prints one JSON object, a
part's number -> its outcome. What the parts print goes to FOLDER/log.txt.

    python -m tests.null_gpu.rehearse FOLDER 0 1 3 4

0 and 3 pass. 1 finds every operator wrong, because all numbers are 0, and 4 no kernel in a profile. The
others would say no more: 2 and 8 compare losses, 5 and 7 train on what is learned, 6 and 9 time what is not
computed.
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks.gpu_check import PARTS
from benchmarks.gpu_findings import Check
from benchmarks.gpu_process import run_in_process


def main(folder: Path, numbers: list[int]) -> None:
    figures, outcomes = {}, {}
    for part in PARTS:
        if part.number in numbers:
            check = Check(torch.device("cuda", 0), True, folder, folder, dict(figures))
            outcome = run_in_process(part, check, 300, folder / "log.txt")
            figures |= outcome.figures
            outcomes[part.number] = vars(outcome)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(number) for number in sys.argv[2:]])
