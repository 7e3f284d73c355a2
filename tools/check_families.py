"""What works on each family of decoder-only language models, from tiny random models: a stored table.

`python tools/check_families.py` writes nbs/results/families.json, a row per family: each check is "works",
or the one line with which it is refused, or the error that says what is wrong.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from families import FAMILIES, LAYERS, tiny_config, tiny_model
from short_runs import short_run
from torch import nn

from oprd_nb.capture import FINAL, capture, lm_head_of
from oprd_nb.models.checks import check_head, check_padding
from oprd_nb.models.loading import load_model
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.objective import loss_of
from oprd_nb.objectives.output_space import FullKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.objectives.terms import Objective, Term, as_objective
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.teachers import Teacher
from oprd_nb.training.reach import EXPERTS, freeze_unused
from oprd_nb.training.trainer import OPRDTrainer

RESULTS = Path(__file__).parents[1] / "nbs" / "results" / "families.json"
OBJECTIVES: dict[str, Term | Objective] = {
    "all": Representation(),
    "odd": Representation(layers="odd"),
    "last": Representation(layers="last"),
    "full KL": FullKL(),
}


def some_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of six tokens, all of them read."""
    ids = torch.arange(3, 15).view(2, 6)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def check_load(family: str) -> None:
    """`load_model` takes its folder."""
    # A relative path, so that what is said, and stored, is the same on every machine.
    with tempfile.TemporaryDirectory() as parent, chdir(parent):
        config = tiny_config(family)
        config.save_pretrained(family)
        if not config.is_encoder_decoder:
            tiny_model(family).save_pretrained(family)
        load_model(f"./{family}", device="cpu")


def check_states(family: str) -> None:
    """Every layer can be captured, and the head's logits of the final states are the model's own."""
    model = tiny_model(family)
    ids, mask = some_tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.flatten(0, 1)
        captured = capture(model, ids, mask, mask, [*range(1, LAYERS + 1), FINAL])
        torch.testing.assert_close(lm_head_of(model)(captured[FINAL]), expected, atol=1e-4, rtol=1e-4)
    check_head(model, family)


def check_pads(family: str) -> None:
    """Pads on the left change nothing, or the model is refused where there are any."""
    check_padding(tiny_model(family), "model")


def in_experts(model: nn.Module) -> set[str]:
    """Names of parameters of experts, which a short pass reaches or not."""
    return {name for name, _ in model.named_parameters() if any(part in EXPERTS for part in name.split("."))}


def check_gradients(family: str) -> None:
    """Parameters that get a gradient are those left trainable, experts that no token chose aside."""
    ids, mask = some_tokens()
    for name, objective in OBJECTIVES.items():
        model = tiny_model(family)
        frozen = freeze_unused(model, objective)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        # Also what was frozen may get a gradient now, so that a wrong choice shows.
        for parameter in frozen:
            model.get_parameter(parameter).requires_grad_(True)
        terms = as_objective(objective)
        layers = [key for _, term in terms.terms for key in term.student_layers(LAYERS)]
        states = capture(model, ids, mask, mask, list(dict.fromkeys(layers)), terms.final_norm)
        read = [states[layer] for layer in dict.fromkeys(layers)]
        if terms.needs_head:
            read.append(lm_head_of(model)(states[FINAL]))
        torch.stack([values.square().sum() for values in read]).sum().backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
        assert reached <= trainable, f"{name}: {sorted(reached - trainable)[:3]} are frozen"
        left = trainable - reached - in_experts(model)
        assert not left, f"{name}: {sorted(left)[:3]} have no gradient"


def check_identity(family: str) -> None:
    """A student that is its teacher has loss 0, and another one has not."""
    pair = embedded("same")
    model, other = tiny_model(family), tiny_model(family, seed=1)
    rollouts = HFSampler(model, pair.tokenizer).sample(pair.task.test["prompt"][:4], max_new_tokens=6, seed=0)
    for objective in (Representation(positions="all"), FullKL()):
        same, _ = loss_of(
            objective, model, Teacher(tiny_model(family), pair.tokenizer), rollouts, pair.tokenizer
        )
        apart, _ = loss_of(objective, model, Teacher(other, pair.tokenizer), rollouts, pair.tokenizer)
        assert same.abs() < 1e-5 < apart, f"loss {float(same):.2g} of itself, {float(apart):.2g} of another"


def check_steps(family: str) -> None:
    """Two steps of the trainer change the weights, and leave them finite."""
    pair = embedded("same")
    model = tiny_model(family)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with tempfile.TemporaryDirectory() as folder:
        settings = short_run(
            folder,
            max_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            warmup_steps=0,
            per_device_train_batch_size=4,
            max_completion_length=6,
        )
        teacher = Teacher(tiny_model(family, seed=1), pair.tokenizer)
        trainer = OPRDTrainer(
            model, teacher, Representation(positions="all"), settings, pair.task.train, pair.tokenizer
        )
        trainer.train()
    changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2, f"{sum(changed)} of {len(changed)} tensors changed"
    assert all(parameter.isfinite().all() for parameter in model.parameters())


CHECKS: dict[str, Callable[[str], None]] = {
    "load": check_load,
    "states": check_states,
    "padding": check_pads,
    "gradients": check_gradients,
    "identity": check_identity,
    "steps": check_steps,
}


def outcome(check: Callable[[str], None], family: str) -> str:
    """ "works", or in one line why not: ValueError is a refusal, everything else is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(family)
    except ValueError as error:
        return "refused: " + " ".join(str(error).split())[:200]
    except Exception as error:
        return f"wrong: {type(error).__name__}: " + " ".join(str(error).split())[:200]
    return "works"


def check_family(family: str) -> dict[str, str]:
    """All checks of one family; of one that is refused at load, the first alone."""
    row = {"family": family}
    for name, check in CHECKS.items():
        row[name] = outcome(check, family) if row.get("load", "works") == "works" else "not loaded"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for family in args.families:
        rows.append(check_family(family))
        print(rows[-1], flush=True)
    stored = {"command": "python tools/check_families.py", "rows": rows}
    args.out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
