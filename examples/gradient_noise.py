"""Signal and noise of gradients on the way from the embedded student to its teacher (Theorem 1).

    python examples/gradient_noise.py --out nbs/results/theory/gradient_noise.csv

At each share of the way the sampled token's gradient is drawn anew from one fixed batch of rollouts; its mean
is full KL's gradient. One row per term and share: divergence (symmetric KL, nats), signal and noise.
"""

import argparse
from pathlib import Path

import pandas as pd

from oprd_nb.cli.arguments import quiet
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.output_space import FullKL, SampledTokenKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.teachers import Teacher
from oprd_nb.theory import gradient_noise

SHARES = (1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("nbs/results/theory/gradient_noise.csv"))
    parser.add_argument("--draws", type=int, default=32, help="Draws of the sampled token per share.")
    args = parser.parse_args()
    quiet()
    pair = embedded("same")
    rollouts = HFSampler(pair.student, pair.tokenizer).sample(
        pair.task.test["prompt"][:16], max_new_tokens=40, seed=0
    )
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer)
    noisy, certain = {"sampled token": SampledTokenKL()}, {"full KL": FullKL(), "OPRD": Representation()}
    tables = [
        gradient_noise(pair.student, teacher, rollouts, pair.tokenizer, terms, SHARES, draws)
        for terms, draws in ((noisy, args.draws), (certain, 2))
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pd.concat(tables).to_csv(args.out, index=False, float_format="%.6g")
    print(args.out)
