"""Does on an accelerator what a GPU's user does, and on the CPU for comparison; prints JSON.

usage: work.py BUILD [--device emu|cuda] [--parts losses,training,...]

BUILD: the folder for the compiled device, where it is the emulated one, as it is by default. Every part of
the result is a number, or a list of them, or under "refused" the message of what could not be done.
"""

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from accelerate import dispatch_model
from accelerate.state import AcceleratorState
from conftest import tiny_qwen3
from emulated.device import Events, claim_bfloat16, start
from emulated.gpu import CudaListener
from peft import LoraConfig, get_peft_model

from oprd_nb.bridge.pca import Bridge, fit_bridge
from oprd_nb.bridge.readout import fit_readout
from oprd_nb.core import Rollouts
from oprd_nb.diagnosis import diagnose
from oprd_nb.evaluation.sampling import evaluate
from oprd_nb.explore.scores import score_tokens
from oprd_nb.models.pairs import ModelPair, embedded
from oprd_nb.objectives.distances import Target, position_distances
from oprd_nb.objectives.objective import loss_of, loss_on_pairs
from oprd_nb.objectives.output_space import FullKL, SampledTokenKL, TopKKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.objectives.terms import Objective, Term, as_objective
from oprd_nb.probing.linear import linear_probe
from oprd_nb.probing.states import collect, join_states
from oprd_nb.rollouts.samplers import HFSampler, ReplaySampler
from oprd_nb.structure.moments import Moments
from oprd_nb.teachers import Teacher
from oprd_nb.training.config import OPRDConfig
from oprd_nb.training.diagnostics import output_diagnostics, representation_diagnostics
from oprd_nb.training.trainer import OPRDTrainer

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
PARTS = ("losses", "bridges", "measured", "adapters", "split", "evaluation", "training", "counts")
parser = argparse.ArgumentParser()
parser.add_argument("build", type=Path)
parser.add_argument("--device", default="emu")
parser.add_argument("--parts", default=",".join(PARTS))
OPTIONS = parser.parse_args()
if OPTIONS.device == "emu":
    LISTENER = start(OPTIONS.build)
    claim_bfloat16()
else:
    LISTENER = CudaListener()

FIRST = f"{OPTIONS.device}:0"
SECOND = f"{OPTIONS.device}:1"
HAS_TWO = torch.accelerator.device_count() > 1
PLACES = {"cpu": ("cpu", "cpu"), "device": (FIRST, FIRST), "host teacher": (FIRST, "cpu")}
"""Where student and teacher are, by name."""
if HAS_TWO:
    PLACES["two devices"] = (FIRST, SECOND)


class OnDevices:
    """The embedded pair at a place, and rollouts, which are on the CPU."""

    def __init__(self, place: str, rollouts: Rollouts, name: str = "same"):
        self.pair: ModelPair = embedded(name)
        student_device, teacher_device = PLACES[place]
        self.student = self.pair.student.to(student_device)
        self.teacher = Teacher(self.pair.teacher.to(teacher_device), self.pair.teacher_tokenizer)
        self.tokenizer = self.pair.tokenizer
        self.rollouts = rollouts

    def reading(self) -> tuple:
        """What most functions take first."""
        return self.student, self.teacher, self.rollouts, self.tokenizer


def loss_and_gradient(objective: Term | Objective, at: OnDevices) -> list[float]:
    """The loss, the norm of its gradient and the sum of its metrics."""
    at.student.zero_grad()
    loss, metrics = loss_of(objective, *at.reading())
    loss.backward()
    squares = [p.grad.square().sum().item() for p in at.student.parameters() if p.grad is not None]
    return [loss.item(), sum(squares) ** 0.5, sum(metrics.values())]


def objectives() -> dict[str, Term | Objective]:
    """One of every kind without a bridge."""
    return {
        "representation": Representation(),
        "mse": Representation(distance="mse", predicting=True),
        "full": FullKL(),
        "jsd": FullKL("jsd"),
        "topk": TopKKL(4),
        "sampled": SampledTokenKL(control_variate=True),
        "sum": (SampledTokenKL() + 10 * Representation("even")).with_reduction("sequence"),
    }


def losses(place: str, rollouts: Rollouts) -> dict[str, list[float]]:
    """`loss_and_gradient` of every objective."""
    at = OnDevices(place, rollouts)
    return {name: loss_and_gradient(objective, at) for name, objective in objectives().items()}


def bridged(place: str, rollouts: Rollouts) -> dict[str, list[float]]:
    """Both kinds of bridge, fitted there, and the loss behind them."""
    at = OnDevices(place, rollouts, "cross_architecture")
    pca = fit_bridge(*at.reading(), 4)
    readout = fit_readout(*at.reading(), steps=5)
    readout_objective = Representation("last", bridge=readout, predicting=True)
    return {
        "scores of a bridge": [float(pca.scores["r2"].sum()), float(pca.scores["cosine"].sum())],
        "scores of a readout": [float(readout.scores[name].sum()) for name in ("fitted", "student", "ridge")],
        "bridge": loss_and_gradient(Representation(bridge=pca), at),
        "readout": loss_and_gradient(readout_objective, at),
    }


def split_over_devices(rollouts: Rollouts) -> dict[str, list[float]]:
    """The losses of a student and a teacher whose layers are on two devices each."""
    at = OnDevices("cpu", rollouts)
    for model, head in ((at.student, FIRST), (at.teacher.model, SECOND)):
        layers = {f"model.layers.{i}": (FIRST, SECOND)[i // 2] for i in range(4)}
        places = {"model.embed_tokens": FIRST, "model.norm": SECOND, "model.rotary_emb": FIRST}
        dispatch_model(model, places | layers | {"lm_head": head}, main_device=FIRST, force_hooks=True)
    return {name: loss_and_gradient(objective, at) for name, objective in objectives().items()}


def adapted_head(place: str, rollouts: Rollouts) -> list[float]:
    """The loss of a student with adapters on its head, which are not zero."""
    at = OnDevices(place, rollouts)
    torch.manual_seed(0)
    adapters = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    at.student = get_peft_model(at.student, adapters)
    return loss_and_gradient(FullKL(), at)


def read(place: str, rollouts: Rollouts) -> dict[str, list[float]]:
    """What both models are measured by."""
    at = OnDevices(place, rollouts)
    report = diagnose(*at.reading())
    numbers = report.layers.drop(columns=["layer", "teacher_layer"]).to_numpy(float)
    states = join_states(collect(*at.reading()))
    probe = linear_probe(states.student, states.token, states.response)
    scores = score_tokens(*at.reading())
    outputs = output_diagnostics(at.student, at.teacher, rollouts, at.tokenizer)
    hidden = representation_diagnostics(at.student, at.teacher, rollouts, at.tokenizer)
    return {
        "diagnosis": numbers.sum(0).tolist(),
        "rank curve": report.curve[["cosine", "r2", "explained_variance"]].sum().tolist(),
        "probe": probe[["score", "control", "chance"]].sum().tolist(),
        "token scores": [float(scores["kl"].sum()), float(scores["distance"].sum())],
        "output diagnostics": list(outputs.values()),
        "representation diagnostics": list(hidden.values()),
    }


def evaluated(place: str) -> list[float]:
    """Greedy answers to eight problems; how many tokens they have, and how many are right."""
    pair = embedded("same")
    sampler = HFSampler(pair.student.to(PLACES[place][0]), pair.tokenizer)
    result = evaluate(
        sampler, pair.task.test.select(range(8)), n=1, temperature=0.0, max_new_tokens=40, progress=False
    )
    return [float(result.samples["token_ids"].map(len).sum()), float(result.samples["correct"].sum())]


class CountingTrainer(OPRDTrainer):
    """Notes how often the host waited in each micro-batch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.events: list[Events] = []

    def training_step(self, *inputs, **options):
        """The micro-batch, counted."""
        with LISTENER.during() as events:
            loss = super().training_step(*inputs, **options)
        self.events.append(events)
        return loss


def trained(place: str, rollouts: Rollouts, folder: str) -> dict[str, list[float]]:
    """Two steps on stored rollouts: their losses, and waits per micro-batch but the first of a step."""
    # What accelerate remembers of the process's device would hold for the next run too.
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_TORCH_DEVICE"] = PLACES[place][0]
    at = OnDevices("cpu", rollouts)
    at.teacher.model.to(PLACES[place][1])
    args = OPRDConfig(
        f"{folder}/{place}",
        max_steps=2,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        num_generations=1,
        max_completion_length=24,
        logging_steps=1,
        bf16=False,
        use_cpu=place == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logprob_tolerance=float("inf"),
    )
    trainer = CountingTrainer(
        model=at.student,
        teacher=at.teacher,
        objective=Representation(),
        args=args,
        train_dataset=at.pair.task.train.select(range(len(rollouts))),
        processing_class=at.tokenizer,
        sampler=ReplaySampler(rollouts, at.tokenizer),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    later = [events for i, events in enumerate(trainer.events) if i % 3]
    lines = {} if place == "cpu" else later[-1].by_line()
    return {"losses": losses, "waits": max(events.waits() for events in later), "lines": lines}


def random_bridge(layers: int) -> Bridge:
    """A bridge between random models of this depth and width 32."""
    moments = Moments([(layer, layer) for layer in range(1, layers + 1)], 32, 32)
    for pair in moments.layer_pairs:
        states = torch.randn(100, 32, generator=torch.Generator().manual_seed(pair[0]))
        moments.update(pair, states, states.flip(1))
    return Bridge.fit(moments, rank=4)


def micro_batch(objective: Term | Objective, layers: int) -> Events:
    """Forward and backward passes of two random models of this depth on four responses of 20 tokens."""
    student = tiny_qwen3(0, layers=layers).to(FIRST)
    teacher = Teacher(tiny_qwen3(1, layers=layers).to(FIRST), embedded("same").tokenizer)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 30, (4, 24), generator=generator)
    mask = torch.ones_like(ids).bool()
    response = mask.clone()
    response[:, :4] = False
    rollouts = Rollouts(ids, mask, response).to(FIRST)
    pairs = teacher.read(rollouts, teacher.tokenizer)
    terms = as_objective(objective)
    counts = terms.counts(pairs)
    # The first one moves a bridge's maps to the device, where they stay.
    for _ in range(2):
        with LISTENER.during() as events:
            loss, _ = loss_on_pairs(terms, student, teacher, rollouts, pairs, counts)
            loss.backward()
    return events


def counted(rollouts: Rollouts) -> dict[str, dict]:
    """Waits of micro-batches and of measurements, with the lines that caused them; operators of distances."""
    events = {}
    for layers in (4, 28):
        of_this_depth = {
            "representation": Representation(),
            "full": FullKL(),
            "bridge": Representation(bridge=random_bridge(layers)),
            "sum": (SampledTokenKL() + 10 * Representation(positions="last:5")).with_reduction("sequence"),
        }
        for name, objective in of_this_depth.items():
            events[f"{name}, {layers} layers"] = micro_batch(objective, layers)
    at = OnDevices("device", rollouts)
    with LISTENER.during() as events["diagnose"]:
        diagnose(*at.reading())
    states = join_states(collect(*at.reading()))
    with LISTENER.during() as events["linear_probe"]:
        linear_probe(states.student, states.token, states.response)
    hidden = torch.randn(4000, 1536, dtype=torch.bfloat16, device=FIRST, requires_grad=True)
    target = torch.randn_like(hidden.detach())
    with LISTENER.during() as events["distances"]:
        losses, _ = position_distances(hidden, Target.of(target), "normalized_mse")
        losses.sum().backward()
    return {
        name: {"waits": seen.waits(), "operators": seen.operators(), "lines": seen.by_line()}
        for name, seen in events.items()
    }


def everything(parts: list[str]) -> dict:
    """The named parts, and what was refused."""
    pair = embedded("same")
    prompts = pair.task.train["prompt"][:80]
    rollouts = HFSampler(pair.student, pair.tokenizer).sample(prompts, max_new_tokens=24)
    few = rollouts.select(range(12))
    results: dict = {"refused": {}}

    def attempt(name: str, work: Callable, *inputs) -> None:
        try:
            results[name] = work(*inputs)
        except Exception as error:
            own = [
                frame for frame in traceback.extract_tb(error.__traceback__) if "oprd_nb" in frame.filename
            ]
            lines = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in own]
            results["refused"][name] = f"{str(error).splitlines()[0]} ({' < '.join(reversed(lines))})"

    everywhere = {
        "losses": ("losses", losses, few),
        "bridges": ("bridges", bridged, rollouts),
        "measured": ("measured", read, rollouts),
        "adapters": ("adapters on the head", adapted_head, few),
    }
    for part, (name, work, read_rollouts) in everywhere.items():
        for place in PLACES:
            if part in parts:
                attempt(f"{name}, {place}", work, place, read_rollouts)
    if "split" in parts and HAS_TWO:
        attempt("losses, split", split_over_devices, few)
    for place in ("cpu", "device"):
        if "evaluation" in parts:
            attempt(f"evaluation, {place}", evaluated, place)
    with TemporaryDirectory() as folder:
        for place in PLACES:
            if "training" in parts and place != "host teacher":
                attempt(f"training, {place}", trained, place, few, folder)
    if "counts" in parts:
        attempt("counts", counted, rollouts)
    return results


if __name__ == "__main__":
    print(json.dumps(everything(OPTIONS.parts.split(","))))
