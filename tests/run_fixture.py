"""Synthetic run folders: seeded, made-up curves in the real format, for tests and illustrations. Nothing in them was measured."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

SHAPES = {  # method: (accuracy after training, speed, seconds a step, bytes of delta-peak memory, tokens a response)
    "oprd": (0.88, 4.0, 0.22, 9.5e7, 23.0),
    "opd-full": (0.52, 2.0, 0.26, 2.1e8, 24.5),
    "opd-sampled": (0.31, 1.2, 0.23, 1.6e8, 26.0),
    "opd-topk": (0.46, 1.8, 0.25, 1.8e8, 25.0),
    "bridge": (0.24, 1.0, 0.24, 1.0e8, 26.0),
    "readout": (0.93, 3.5, 0.25, 1.1e8, 23.0),
}
BEFORE = 0.21


def synthetic_metrics(method: str, seed: int = 0, steps: int = 200, layers: int = 4) -> list[dict]:
    """The rows of metrics.jsonl: training values every step, evaluation values ten times a run."""
    after, speed, pace, peak, length = SHAPES[method]
    rng, rows = np.random.default_rng([seed, len(method)]), []
    for step in range(1, steps + 1):
        done = (1 - np.exp(-speed * step / steps)) / (1 - np.exp(-speed))
        cosine = 0.80 + 0.19 * done * (1.0 if method in ("oprd", "readout") else 0.4)
        row = {
            "step": step,
            "seconds": step * pace,
            "loss": 2 * (1 - cosine) + 0.01 * rng.normal(),
            "rep/cosine_similarity": cosine + 0.004 * rng.normal(),
            "actor/pg_loss": 0.4 - 0.35 * done + 0.03 * rng.normal(),
            "response_length/mean": 30 + (length - 30) * done + 0.5 * rng.normal(),
            "response/truncated": 0.15 * (1 - done),
            "grad/snr": np.exp(1.0 - 1.5 * done + 0.2 * rng.normal()) * (8 if method == "oprd" else 1),
            "time/rollout": 0.6 * pace,
            "time/teacher": 0.1 * pace,
            "time/update": 0.3 * pace,
            "memory/delta_peak": peak,
        }
        row |= {
            f"rep/cosine_layer_{layer}": cosine + 0.03 * (2 - layer) * (1 - done)
            for layer in range(1, layers + 1)
        }
        if step % max(1, steps // 10) == 0:
            row |= {
                "eval/avg@1": BEFORE + (after - BEFORE) * done + 0.015 * rng.normal(),
                "actor/entropy": 0.5 - 0.3 * done,
                "teacher/entropy": 0.18,
                "topk/overlap_ratio": 0.7 + 0.25 * done,
            }
        rows.append(row)
    return rows


def synthetic_response(numbers: np.ndarray, slip: int) -> str:
    """A worked three-operand sum; `slip` is added to the first partial sum."""
    first = int(numbers[0] + numbers[1] + slip)
    total = first + int(numbers[2])
    return f"{numbers[0]}+{numbers[1]}={first}\n{first}+{numbers[2]}={total}\n\\boxed{{{total}}}"


def synthetic_samples(
    accuracy: float, seed: int, step: int, problems: int = 200, samples: int = 1
) -> pd.DataFrame:
    """The rows of eval/*.parquet; the problems are the same for every seed, the answers are not."""
    numbers = np.random.default_rng(0).integers(10, 100, (problems, 3))
    rng, rows = np.random.default_rng([seed, step, int(1000 * accuracy)]), []
    for problem in range(problems):
        for sample in range(samples):
            right = bool(rng.random() < accuracy)
            text = synthetic_response(numbers[problem], 0 if right else int(rng.choice([-10, -1, 1, 10])))
            rows.append(
                {
                    "problem": problem,
                    "sample": sample,
                    "prompt": "+".join(map(str, numbers[problem])),
                    "answer": str(numbers[problem].sum()),
                    "response": text,
                    "tokens": len(text) - 5,
                    "truncated": False,
                    "correct": right,
                    "extracted": text.split("{")[1][:-1],
                    "seconds": 0.01,
                    "set": "arithmetic",
                    "step": step,
                }
            )
    return pd.DataFrame(rows)


def synthetic_run(
    folder: str | Path,
    method: str = "oprd",
    seed: int = 0,
    steps: int = 200,
    problems: int = 200,
    samples: int = 1,
    **config,
) -> Path:
    """Write one synthetic run folder and return its path; `config` overrides keys of config.yaml."""
    folder = Path(folder)
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    settings = {
        "method": method,
        "seed": seed,
        "learning_rate": 3e-3,
        "student": "embedded:student",
        "teacher": "embedded:teacher",
        "task": "arithmetic",
        "steps": steps,
        "batch": 64,
        "num_generations": 1,
        "objective": method,
        "synthetic": True,
        "versions": {"oprd_nb": "0.1.0", "torch": "2.13.0", "trl": "1.16.0"},
    } | config
    rows = synthetic_metrics(method, seed, steps)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = SHAPES[method][0]
    synthetic_samples(BEFORE, seed, 0, problems, samples).to_parquet(folder / "eval" / "before.parquet")
    synthetic_samples(after, seed, steps, problems, samples).to_parquet(folder / "eval" / "after.parquet")
    (folder / "summary.json").write_text(json.dumps({"seconds": rows[-1]["seconds"]}))
    return folder
