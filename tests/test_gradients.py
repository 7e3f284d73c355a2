"""The gradient of each term during a run: as the full gradients say, and without a trace in the weights."""

import shutil
from html import escape

import pytest
import torch
from peft import LoraConfig
from short_runs import short_run
from transformers import TrainerCallback

from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.followups import CrossFade
from oprd_nb.objectives.output_space import FullKL, SampledTokenKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.plots.report import report_html
from oprd_nb.rollouts.samplers import HFSampler, ReplaySampler
from oprd_nb.runs import read_run
from oprd_nb.runs.tables import gradient_advice
from oprd_nb.teachers import Teacher
from oprd_nb.training import gradient_steps
from oprd_nb.training.trainer import OPRDTrainer
from oprd_nb.utils import read_jsonl

REP = Representation(positions="last:9")


class FirstGradient(TrainerCallback):
    """The whole gradient of the first step, as one vector by parameter name."""

    def __init__(self):
        self.parts = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self.parts = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(folder, objective, name="same", sampler=None, peft_config=None, **changes):
    """A short run of a new student; returns its trainer and its first gradient."""
    pair = embedded(name)
    seen = FirstGradient()
    trainer = OPRDTrainer(
        model=pair.student,
        teacher=Teacher(pair.teacher, pair.teacher_tokenizer),
        objective=objective,
        args=short_run(folder, max_grad_norm=0.0, **changes),
        train_dataset=pair.task.train.select(range(64)),
        processing_class=pair.tokenizer,
        sampler=sampler,
        peft_config=peft_config,
        callbacks=[seen],
    )
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return trainer, seen.parts


def measured(folder):
    """The lines of a run's log that hold a measurement, by step."""
    lines = read_jsonl(folder / "metrics.jsonl")
    return {line["step"]: line for line in lines if any(name.startswith("gradient/") for name in line)}


@pytest.fixture(scope="module")
def replay():
    """The same responses for every run that asks."""
    pair = embedded("same")
    prompts = pair.task.train["prompt"][:64]
    stored = HFSampler(pair.student, pair.tokenizer).sample(prompts, max_new_tokens=40, seed=0)
    return lambda: ReplaySampler(stored, pair.tokenizer)


def test_what_a_run_measures_are_its_full_gradients(replay, tmp_path, monkeypatch):
    """Read on all responses of a step, norms and cosines are those of runs of each term alone, within 5 %."""
    monkeypatch.setattr(gradient_steps, "SHARE", 1)
    alone = {}
    for name, term in {"sampled": SampledTokenKL(), "rep": REP, "full": FullKL()}.items():
        _, alone[name] = train(tmp_path / name, term, sampler=replay(), max_steps=1, gradient_every=0)
    train(tmp_path / "both", SampledTokenKL() + 10 * REP, sampler=replay(), max_steps=1)
    line = measured(tmp_path / "both")[1]
    everywhere = alone["full"].keys()
    vectors = {}
    for name, parts in alone.items():
        # A run of OPRD alone does not train the head, which its loss does not reach.
        vectors[name] = torch.cat(
            [parts.get(key, torch.zeros_like(alone["full"][key])).flatten() for key in everywhere]
        )
    for name, vector in vectors.items():
        assert line[f"gradient/{name}/norm"] == pytest.approx(vector.norm().item(), rel=0.05)
    ratio = vectors["rep"].norm() / vectors["full"].norm()
    assert line["gradient/rep/ratio"] == pytest.approx(ratio.item(), rel=0.05)
    for one, other in (("full", "rep"), ("full", "sampled"), ("rep", "sampled")):
        cosine = torch.cosine_similarity(vectors[one], vectors[other], dim=0).item()
        assert line[f"gradient/cosine/{one}~{other}"] == pytest.approx(cosine, abs=0.05)


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(gradient_accumulation_steps=2, token_budget=150),
        dict(disable_dropout=False, gradient_checkpointing=True),
        dict(
            peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3), disable_dropout=False
        ),
    ],
    ids=["plain", "accumulation and a budget", "checkpointing", "adapters with dropout"],
)
def test_a_measured_run_is_bitwise_the_run_without(changes, tmp_path):
    objective = FullKL() + 3 * REP
    runs = [train(tmp_path / str(every), objective, gradient_every=every, **changes)[0] for every in (1, 0)]
    with_it, without = (dict(trainer.model.named_parameters()) for trainer in runs)
    assert with_it.keys() == without.keys()
    assert all(with_it[name].equal(without[name]) for name in without)
    assert sorted(measured(tmp_path / "1")) == [1, 2, 3] and not measured(tmp_path / "0")
    losses = [[line.get("loss") for line in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in "10"]
    assert losses[0] == losses[1]


def test_only_several_terms_are_measured_unless_asked(tmp_path):
    train(tmp_path / "one", REP)
    assert not measured(tmp_path / "one")
    train(tmp_path / "asked", REP, gradient_every=2)
    found = measured(tmp_path / "asked")
    assert sorted(found) == [1, 2, 3], "the first step, the middle and the last, and every second one"
    assert {name for name in found[1] if name.startswith("gradient/")} == {
        "gradient/rep/norm",
        "gradient/rep/ratio",
        "gradient/full/norm",
        "gradient/cosine/full~rep",
    }
    assert found[1]["time/gradients"] > 0 and found[1]["time/update"] > 0


def test_start_middle_and_end_of_a_longer_run(tmp_path):
    train(tmp_path, FullKL() + REP, max_steps=23, per_device_train_batch_size=2)
    assert sorted(measured(tmp_path)) == [1, 10, 12, 20, 23]


@pytest.mark.filterwarnings("ignore:only .* of the student's tokens")
def test_across_tokenizers_there_is_no_full_kl_to_compare_with(tmp_path):
    train(tmp_path, REP + Representation("2", positions="last:3"), name="cross_tokenizer", max_steps=1)
    names = {name for name in measured(tmp_path)[1] if name.startswith("gradient/")}
    assert names == {"gradient/rep/norm", "gradient/rep_2/norm", "gradient/cosine/rep~rep_2"}


@pytest.mark.parametrize("every", [-1, float("nan")])
def test_a_number_of_steps_that_makes_no_sense(every, tmp_path):
    with pytest.raises(ValueError, match="gradient_every"):
        short_run(tmp_path, gradient_every=every)


def test_sharded_gradients_are_not_measured(tmp_path, monkeypatch):
    """FSDP and DeepSpeed: refused where it is asked for, left out where it is only the default."""
    monkeypatch.setattr(OPRDTrainer, "why_no_gradients", lambda self: "FSDP keeps no whole gradient")
    with pytest.raises(ValueError, match="gradient_every=5: FSDP keeps no whole gradient; leave it away"):
        train(tmp_path, FullKL() + REP, gradient_every=5)
    train(tmp_path, FullKL() + REP, max_steps=1)
    assert not measured(tmp_path)


def test_reentrant_checkpointing_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="gradient_every=1: checkpointing with use_reentrant=True"):
        train(
            tmp_path,
            FullKL() + REP,
            gradient_every=1,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )


def test_the_report_advises_a_weight_and_draws_the_cosines(tmp_path):
    """The weight is the quotient of the norms; runs without measurements say nothing."""
    train(tmp_path / "two", FullKL() + 3 * REP, max_steps=2)
    train(tmp_path / "one", REP, max_steps=1)
    table = read_run(tmp_path / "two").metrics
    (line,) = gradient_advice(table)
    weight = table["gradient/full/norm"].mean() / table["gradient/rep/norm"].mean()
    assert line.startswith(f"gradient: rep pulls as hard as full at weight {weight:.3g} (cosine ")
    assert gradient_advice(read_run(tmp_path / "one").metrics) == []
    page = report_html([read_run(tmp_path / "two")])
    assert escape(line) in page and "Gradient of each term" in page
    without = report_html([read_run(tmp_path / "one")])
    assert "Gradient of each term" not in without and "gradient: " not in without


def weights_of(trainer):
    return {name: weight.clone() for name, weight in trainer.model.named_parameters()}


def test_a_balance_forgets_the_weights_it_began_with(tmp_path):
    """From any starting weight the same run; each measured weight gives the ratio that was asked for."""
    options = dict(balance=2.0, gradient_every=2, gradient_accumulation_steps=2, max_steps=4)
    runs = [train(tmp_path / str(mu), FullKL() + mu * REP, **options)[0] for mu in (0.01, 1, 100)]
    first, *others = map(weights_of, runs)
    assert all(first[name].equal(other[name]) for other in others for name in first)
    lines = measured(tmp_path / "100")
    norms = []
    for step in sorted(lines):
        norms.append([lines[step][f"gradient/{name}/norm"] for name in ("full", "rep")])
        means = torch.tensor(norms[0])
        for later in norms[1:]:
            means = (means * torch.tensor(later)).sqrt()
        assert lines[step]["gradient/full/weight"] == 1
        assert lines[step]["gradient/rep/weight"] == pytest.approx((2 * means[0] / means[1]).item(), rel=1e-5)
    assert sorted(lines) == [1, 2, 4]


def test_without_a_balance_the_weights_stay(tmp_path):
    runs = [train(tmp_path / str(mu), FullKL() + mu * REP, max_steps=1)[0] for mu in (0.01, 100)]
    first, second = map(weights_of, runs)
    assert not all(first[name].equal(second[name]) for name in first)
    assert "gradient/rep/weight" not in measured(tmp_path / "100")[1]


def test_a_resumed_balance_goes_on(tmp_path):
    """The norms lie in the checkpoint: a run that was stopped between two measurements ends bitwise alike."""
    options = dict(balance=1.0, gradient_every=4, max_steps=6, save_strategy="steps", save_steps=2)
    whole, _ = train(tmp_path / "run", FullKL() + 50 * REP, **options)
    ended = weights_of(whole)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    options["resume_from_checkpoint"] = True
    resumed, _ = train(tmp_path / "run", FullKL() + 50 * REP, **options)
    assert all(ended[name].equal(weight) for name, weight in weights_of(resumed).items())
    with pytest.raises(ValueError, match=r"gradient_every=2 \(it was 4\)"):
        train(tmp_path / "run", FullKL() + 50 * REP, **options | {"gradient_every": 2})


@pytest.mark.parametrize(
    "objective, changes, message",
    [
        (REP, dict(), "there is one term; add another"),
        (CrossFade.of(REP, FullKL()), dict(), "CrossFade sets the weights itself"),
        (FullKL() + REP, dict(gradient_every=0), "gradient_every=0 measures nothing"),
        (FullKL() + REP, dict(balance=0.0), "balance=0.0: must be between"),
        (FullKL() + REP, dict(balance=float("nan")), "balance=nan: must be between"),
    ],
)
def test_a_balance_that_cannot_be_is_refused_in_one_line(objective, changes, message, tmp_path):
    with pytest.raises(ValueError, match="balance") as refused:
        train(tmp_path / "run", objective, **{"balance": 1.0} | changes)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_balance_needs_whole_gradients(tmp_path, monkeypatch):
    monkeypatch.setattr(OPRDTrainer, "why_no_gradients", lambda self: "FSDP keeps no whole gradient")
    with pytest.raises(ValueError, match="balance=3: FSDP keeps no whole gradient; leave it away"):
        train(tmp_path, FullKL() + REP, balance=3.0)
