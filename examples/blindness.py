"""What SmolLM2's head cannot see (`make smollm2`), at positions of its own answers to sums.

python examples/blindness.py --out nbs/results/theory/blindness_smollm2.csv
"""

import argparse
from pathlib import Path

import torch

from oprd_nb.capture import FINAL, capture_each
from oprd_nb.core import Positions
from oprd_nb.models.loading import load_model, load_tokenizer
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.tasks.loading import load_task
from oprd_nb.theory import head_blindness

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("nbs/results/theory/blindness_smollm2.csv"))
    parser.add_argument("--rows", type=int, default=256, help="Positions of the answers.")
    parser.add_argument("--directions", type=int, default=65, help="Singular directions, evenly spread.")
    args = parser.parse_args()
    model, tokenizer = load_model("smollm2", dtype="float32"), load_tokenizer("smollm2")
    rollouts = HFSampler(model, tokenizer).sample(
        load_task("arithmetic").test["prompt"][:16], max_new_tokens=48, seed=0
    )
    rows = Positions("all", predicting=True).mask(rollouts.response_mask)
    with torch.no_grad():
        hidden = capture_each(model, rollouts.input_ids, rollouts.attention_mask, {FINAL: rows})[FINAL]
    spread = torch.linspace(0, len(hidden) - 1, min(args.rows, len(hidden))).long()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    head_blindness(model, hidden[spread], args.directions).to_csv(args.out, index=False, float_format="%.6g")
    print(f"{len(spread)} positions of {len(rollouts)} answers: {args.out}")
