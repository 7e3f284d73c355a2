"""Trains the same five steps in one process and in two (DDP, FSDP2), and prints the differences as JSON.

usage: two_processes.py FOLDER KIND ...

KIND is one of
* ddp or fsdp2, followed by any of -lora, -headless, -base, -reward: compared with one process;
* resume-ddp and the like: a run against its own continuation;
* sample-ddp-hf, sample-fsdp2-lora-trl and the like: a run that writes its own responses.
"""

import hashlib
import json
import os
import random
import socket
import sys
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from oprd_nb.bridge.pca import Bridge
from oprd_nb.core import Rollouts
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.output_space import FullKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.objectives.reward import TaskReward
from oprd_nb.rollouts.prompts import encode_prompts
from oprd_nb.rollouts.samplers import HFSampler, ReplaySampler
from oprd_nb.structure.moments import Moments
from oprd_nb.teachers import Teacher
from oprd_nb.training.checkpoints import checkpoint_problem, checkpoints_of
from oprd_nb.training.config import OPRDConfig
from oprd_nb.training.trainer import OPRDTrainer
from oprd_nb.utils import read_jsonl

STEPS, RESPONSES = 5, 16


class Seen(TrainerCallback):
    """Keeps the whole gradient of every step, as the optimizer sees it."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        whole = {
            name.replace("module.", ""): p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        self.gradients.append({name: g.clone() for name, g in whole.items()})


def become_fsdp(accelerate_init):
    """Accelerate offers FSDP on accelerators only, so two CPU processes declare themselves such."""

    def init(self, *args, **options):
        accelerate_init(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
                state_dict_type="FULL_STATE_DICT",
                cpu_ram_efficient_loading=False,
                reshard_after_forward=True,
            )
            self.distributed_type = DistributedType.FSDP

    return init


def stored_rollouts(prompts, tokenizer) -> Rollouts:
    """Responses of random tokens and lengths: what is compared is arithmetic, so any text will do."""
    draw = random.Random(0)
    ids = encode_prompts(tokenizer, prompts)
    return Rollouts.from_ids(
        ids,
        [[draw.randrange(4, 20) for _ in range(draw.randint(1, 30))] for _ in ids],
        tokenizer.pad_token_id,
    )


# What two processes cannot measure and one can; with FSDP no process has a whole gradient.
UNSEEN = {"ddp": ("grad/snr",), "fsdp2": ("grad/snr", "gradient/", "time/gradients")}
SAMPLERS = {
    "replay": lambda pair, prompts: ReplaySampler(
        stored_rollouts([*prompts, *prompts], pair.tokenizer), pair.tokenizer
    ),
    "hf": lambda pair, prompts: HFSampler(pair.student, pair.tokenizer),
    "trl": lambda pair, prompts: None,
}


def bridge_for(pair) -> Bridge:
    """A bridge of rank 8 from seeded noise."""
    layers, draw = [(2, 3), (4, 6)], torch.Generator().manual_seed(0)
    moments = Moments(layers, 96, 128)
    for layer in layers:
        moments.update(layer, torch.randn(400, 96, generator=draw), torch.randn(400, 128, generator=draw))
    return Bridge.fit(moments, rank=8)


def digest(bridge: Bridge) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in bridge.tensors.values())).hexdigest()


def run(
    folder: Path,
    rank: int,
    world: int,
    lora: bool = False,
    head: bool = True,
    base: bool = False,
    resume: bool | None = None,
    engine: str = "replay",
    reward: bool = False,
) -> None:
    """Five steps of 16 stored responses, two micro-batches per step and process.

    Ranks above 0 are given a folder of their own, which must stay unwritten.

    Without `head` the objective reads no logits, so that the head is frozen and never called.
    With `base` the teacher is the student without its adapters.
    With `reward` each prompt has two responses, which are compared.
    """
    torch.set_num_threads(1)
    pair = embedded("cross_architecture")
    prompts = pair.task.train.select(range(STEPS * RESPONSES))
    bridge = bridge_for(pair)
    mine = folder if rank == 0 or resume is not None else folder.with_name(f"{folder.name}-rank{rank}")
    saving = (
        dict(save_strategy="no", optim="sgd") if resume is None else dict(save_strategy="steps", save_steps=3)
    )  # SGD does not blow up the last digit, Adam does
    args = OPRDConfig(
        str(mine),
        learning_rate=0.02 if resume is None else 1e-3,  # at 0.05 a last digit grows fourfold per step
        max_steps=STEPS,
        per_device_train_batch_size=RESPONSES // 2 // world,
        gradient_accumulation_steps=2,
        num_generations=1 + reward,
        max_completion_length=30,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
        eval_strategy="steps",
        eval_steps=5,
        **saving,
    )
    seen, representation = Seen(), Representation("2,4", positions="last:9", bridge=None if base else bridge)
    config = (
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=not base) if lora or base else None
    )
    teacher = (
        Teacher.of_base(pair.student, pair.tokenizer)
        if base
        else Teacher(pair.teacher, pair.teacher_tokenizer)
    )
    objective = FullKL() + 3 * representation if head else 3 * representation
    if reward:
        objective = objective + TaskReward(lambda text, answer: len(text) / 30)
    trainer = OPRDTrainer(
        model=pair.student,
        teacher=teacher,
        args=args,
        objective=objective,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)),
        processing_class=pair.tokenizer,
        callbacks=[seen],
        sampler=SAMPLERS[engine](pair, prompts["prompt"]),
        peft_config=config,
    )
    trainer.train(resume_from_checkpoint=resume)
    final = {
        name.replace("module.", ""): p.full_tensor() if isinstance(p, DTensor) else p
        for name, p in trainer.model.named_parameters()
    }
    if rank == 0:
        torch.save(
            {
                "wrapper": type(trainer.model_wrapped).__name__,
                "gradients": seen.gradients,
                "final": {name: p.detach().clone() for name, p in final.items()},
            },
            folder / "seen.pt",
        )
    (folder / f"bridge-{rank}").write_text(digest(bridge))


def launch(folder: Path, kind: str, world: int, **options) -> list[int]:
    """`run` in `world` forked processes; their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(world):
        children.append(os.fork())
        if not children[-1]:
            try:
                warnings.simplefilter("ignore")
                if world > 1:
                    os.environ |= {
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(world),
                        "LOCAL_WORLD_SIZE": str(world),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                        "GLOO_SOCKET_IFNAME": "lo",
                    }
                if kind == "fsdp2":
                    AcceleratorState.__init__ = become_fsdp(AcceleratorState.__init__)
                run(folder, rank, world, **options)
                os._exit(0)
            except BaseException as error:
                traceback.print_exc()
                print(f"{kind}, rank {rank}: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]


def logged(folder: Path, unseen: tuple[str, ...] = ()) -> list[list[str]]:
    """The names on each line of the log, without those that begin with one of `unseen`."""
    lines = read_jsonl(folder / "metrics.jsonl")
    return [sorted(name for name in line if not name.startswith(unseen)) for line in lines]


def apart(a: dict, b: dict) -> float:
    """The largest difference of two sets of tensors, beside the largest entry."""
    return (
        max((a[name] - b[name]).abs().max().item() / max(1.0, b[name].abs().max().item()) for name in b)
        if a.keys() == b.keys()
        else float("inf")
    )


def main(out: Path, kinds: list[str]) -> dict:
    """For every kind: exit statuses, distances of losses and gradients from those of one process.

    Also what ranks above 0 wrote, and whether the bridges agree.
    """
    results = {}
    for variant in sorted({kind.partition("-")[2] for kind in kinds}):
        one, options = (
            out / f"one-{variant}",
            {
                "lora": "lora" in variant,
                "head": "headless" not in variant,
                "base": "base" in variant,
                "reward": "reward" in variant,
            },
        )
        alone = launch(one, "ddp", 1, **options)
        wanted = torch.load(one / "seen.pt")
        for kind in (kind for kind in kinds if kind.partition("-")[2] == variant):
            folder = out / kind
            status = launch(folder, kind.partition("-")[0], 2, **options)
            found = torch.load(folder / "seen.pt")
            results[kind] = {
                "status": alone + status,
                "losses": [losses(one), losses(folder)],
                "gradients": [
                    apart(g, w) for g, w in zip(found["gradients"], wanted["gradients"], strict=True)
                ],
                "tensors": len(wanted["gradients"][0]),
                "wrapper": found["wrapper"],
                "final": apart(found["final"], wanted["final"]),
                "rank1": (out / f"{kind}-rank1").exists(),
                "bridges": len(
                    {
                        (f / name).read_text()
                        for f, name in ((one, "bridge-0"), (folder, "bridge-0"), (folder, "bridge-1"))
                    }
                ),
                "metrics": logged(folder) == logged(one, UNSEEN[kind.partition("-")[0]]),
            }
    return results


def resumed(out: Path, kind: str) -> dict:
    """A run saved at step 3, its last checkpoint damaged, resumed: compared with its first time."""
    folder, kind, lora = out / f"{kind}-resumed", kind.partition("-")[0], "lora" in kind
    status = launch(folder, kind, 2, lora=lora, resume=False)
    first, lines = torch.load(folder / "seen.pt")["final"], losses(folder)
    names = sorted(path.name for path in checkpoints_of(folder)[0].iterdir())
    (
        checkpoints_of(folder)[-1] / "optimizer.bin"
        if kind == "fsdp2"
        else checkpoints_of(folder)[-1] / "optimizer.pt"
    ).write_bytes(b"torn")
    flaws = [checkpoint_problem(path) for path in checkpoints_of(folder)]
    status += launch(folder, kind, 2, lora=lora, resume=True)
    again = torch.load(folder / "seen.pt")
    return {
        "status": status,
        "files": names,
        "flaws": flaws,
        "steps": len(again["gradients"]),
        "final": apart(again["final"], first),
        "losses": [lines, losses(folder)],
    }


def sampled(out: Path, kind: str) -> dict:
    """A run in which each process writes its own responses with the engine that is named last."""
    folder, (backend, *_, engine) = out / kind, kind.split("-")
    status = launch(folder, backend, 2, lora="lora" in kind, engine=engine)
    return {
        "status": status,
        "losses": losses(folder),
        "evaluated": [
            line["eval/avg@1"] for line in read_jsonl(folder / "metrics.jsonl") if "eval/avg@1" in line
        ],
    }


if __name__ == "__main__":
    out, *kinds = sys.argv[1:]
    special = {"resume": resumed, "sample": sampled}
    found = main(Path(out), [kind for kind in kinds if kind.split("-")[0] not in special])
    found |= {
        kind: special[kind.split("-")[0]](Path(out), kind.partition("-")[2])
        for kind in kinds
        if kind.split("-")[0] in special
    }
    print(json.dumps(found))
