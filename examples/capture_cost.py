"""What capture costs beside the bare backbone, on SmolLM2 (`make smollm2`), in one run.

    python examples/capture_cost.py --out nbs/results/capture_cost.json

Times: interleaved rounds in one process, medians, as ratios to the bare backbone's forward pass.
Memory: each way in processes of its own, medians; the extra peak of resident memory over the bare
backbone's, as a ratio to that of `output_hidden_states=True`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}

import torch  # noqa: E402

from oprd_nb.capture import backbone_of, capture, num_layers_of
from oprd_nb.core import Positions, set_seed
from oprd_nb.models.loading import load_model
from oprd_nb.utils import RETURN_MEMORY, measured


def ways(model, time: int):
    """The three ways by name, on two random sequences, keeping the last 512 positions."""
    set_seed(0)
    ids = torch.randint(5, 1000, (2, time))
    mask = torch.ones_like(ids, dtype=torch.bool)
    rows = Positions("last:512").mask(mask)
    backbone, layers = backbone_of(model), list(range(1, num_layers_of(model) + 1))
    return {
        "backbone": lambda: backbone(input_ids=ids, attention_mask=mask.long(), use_cache=False),
        "capture": lambda: capture(model, ids, mask, rows, layers),
        "output_hidden_states": lambda: backbone(
            input_ids=ids, attention_mask=mask.long(), use_cache=False, output_hidden_states=True
        ),
    }


@torch.no_grad()
def seconds(time: int, rounds: int) -> dict[str, float]:
    """Median seconds of each way, rounds interleaved, after one warm-up round."""
    taken = {}
    for r in range(rounds + 1):
        for name, way in ways_of(time).items():
            with measured() as cost:
                way()
            if r:
                taken.setdefault(name, []).append(cost.seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def ways_of(time: int):
    if "model" not in _LOADED:
        _LOADED["model"] = load_model("smollm2", dtype=torch.bfloat16, device="cpu")
    return ways(_LOADED["model"], time)


_LOADED = {}


@torch.no_grad()
def peak(name: str, time: int) -> int:
    """Bytes by which one pass, its result held, raises the resident peak.

    A short pass that loads the kernels comes first.
    """
    short, long = ways_of(64), ways_of(time)
    short[name]()
    with measured() as cost:
        kept = long[name]()
    del kept
    return cost.delta_peak


def peak_of_a_process(name: str, time: int) -> int:
    """`peak`, measured in a fresh process."""
    command = [sys.executable, __file__, "--peak", name, str(time)]
    return int(
        subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | RETURN_MEMORY
        ).stdout
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="nbs/results/capture_cost.json")
    parser.add_argument("--peak", nargs=2, help="(internal) print the peak of one way at one length")
    args = parser.parse_args()
    if args.peak:
        print(peak(args.peak[0], int(args.peak[1])))
        return
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "rounds": args.rounds,
    }
    for time in (1088, 4096):
        every = {
            name: [peak_of_a_process(name, time) for _ in range(3)]
            for name in ("backbone", "capture", "output_hidden_states")
        }
        peaks = {name: statistics.median(values) for name, values in every.items()}
        extra = {name: peaks[name] - peaks["backbone"] for name in ("capture", "output_hidden_states")}
        result[f"T={time}"] = {
            "peak_bytes": every,
            "extra_memory_ratio": extra["capture"] / extra["output_hidden_states"],
        }
    took = seconds(1088, args.rounds)
    result["T=1088"] |= {"seconds": took, "time_ratio": took["capture"] / took["backbone"]}
    Path(args.out).write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
