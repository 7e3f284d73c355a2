"""Given responses among a student's own: which, how many, what is logged of them, and what is refused."""

import copy
import json

import numpy as np
import pytest
import torch
import yaml
from short_runs import short_run
from transformers import TrainerCallback

from oprd_nb.cli import main
from oprd_nb.cli.request import TrainArguments, check_given_request, check_methods
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.followups import Weighted
from oprd_nb.objectives.output_space import CrossEntropy, FullKL, SampledTokenKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.objectives.reward import TaskReward
from oprd_nb.rollouts.mixed import MixedSampler, choose_given, is_given
from oprd_nb.rollouts.prompts import PromptFormat, encode_prompts
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.rollouts.turns import ToolSampler, calculator, calls_of
from oprd_nb.teachers import Teacher
from oprd_nb.training.trainer import OPRDTrainer


@pytest.fixture
def pair():
    return embedded("same")


def mixed(pair, share=0.5, **options):
    return MixedSampler(HFSampler(pair.student, pair.tokenizer), pair.task.train, share, **options)


def test_the_share_is_right_in_the_mean():
    for share in (0.1, 0.25, 0.9):
        draws = np.concatenate([choose_given(10, share, seed) for seed in range(2000)])
        assert abs(draws.mean() - share) < 4 * (share * (1 - share) / len(draws)) ** 0.5
    assert not np.array_equal(choose_given(64, 0.5, 0), choose_given(64, 0.5, 1))


def test_prompts_keep_their_order_and_given_responses_are_the_solutions(pair):
    rows = pair.task.train.select(range(8))
    rollouts = mixed(pair).sample(rows["prompt"], n=2, max_new_tokens=40, seed=5)
    prompts = [ids for ids in encode_prompts(pair.tokenizer, rows["prompt"]) for _ in range(2)]
    assert rollouts.prompt_ids() == prompts
    given = is_given(rollouts)
    assert 0 < given.sum() < 16
    end = pair.tokenizer.eos_token_id
    for i in given.nonzero().squeeze(1).tolist():
        assert rollouts.responses()[i][-1] == end
        assert rollouts.texts(pair.tokenizer)[i] == rows["solution"][i // 2]
    own = (~given).nonzero().squeeze(1)
    alone = HFSampler(pair.student, pair.tokenizer).sample(
        [prompts[i] for i in own.tolist()], max_new_tokens=40, seed=5
    )
    assert rollouts.select(own).responses() == alone.responses()
    assert rollouts.log_probs[given][rollouts.response_mask[given]].isnan().all()
    assert rollouts.select(own).log_probs.isfinite().all()


def test_what_a_tool_wrote_stays_its_own_beside_given_responses(pair):
    rows = pair.task.train.select(range(8))
    tool = ToolSampler(HFSampler(pair.student, pair.tokenizer), calculator, stop="=", max_turns=2)
    rollouts = MixedSampler(tool, rows, 0.5).sample(rows["prompt"], max_new_tokens=40, seed=5)
    own = (~is_given(rollouts)).nonzero().squeeze(1)
    prompts = encode_prompts(pair.tokenizer, rows["prompt"])
    alone = tool.sample([prompts[i] for i in own.tolist()], max_new_tokens=40, seed=5)
    assert calls_of(alone).sum() > 0
    assert rollouts.select(own).completions() == alone.completions()
    assert rollouts.select(own).written() == alone.written()
    assert calls_of(rollouts).tolist() == [
        0 if given else calls_of(alone)[own.tolist().index(i)].item()
        for i, given in enumerate(is_given(rollouts).tolist())
    ]


def test_solutions_are_cut_like_responses(pair):
    rollouts = mixed(pair, share=1.0).sample(pair.task.train["prompt"][:4], max_new_tokens=3)
    assert rollouts.response_lengths.tolist() == [3] * 4 and is_given(rollouts).all()


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 0.5, "until": 0}], ids=["share 0", "until 0"])
def test_without_a_share_the_wrapped_sampler_answers_bit_for_bit(options, pair):
    prompts = pair.task.train["prompt"][:6]
    settings = dict(n=2, temperature=0.8, top_p=0.9, max_new_tokens=30, seed=3)
    through = mixed(pair, **options).sample(prompts, **settings)
    plain = HFSampler(pair.student, pair.tokenizer).sample(prompts, **settings)
    assert torch.equal(through.input_ids, plain.input_ids)
    assert torch.equal(through.log_probs, plain.log_probs) and through.columns is None


def test_a_prompt_without_a_solution_is_named(pair):
    with pytest.raises(ValueError, match=r"solutions: the prompt '.*12\+34.*' has none"):
        mixed(pair).sample([[{"role": "user", "content": "12+34"}]])
    by_text = MixedSampler(HFSampler(pair.student, pair.tokenizer), {"12+34": "46", "7+8": " "}, share=1.0)
    assert by_text.sample(["12+34"]).texts(pair.tokenizer) == ["46"]
    with pytest.raises(ValueError, match="has none"):
        by_text.sample(["7+8"])
    with pytest.raises(ValueError, match="--solution_column"):
        MixedSampler(by_text.sampler, pair.task.train.remove_columns("solution"))
    with pytest.raises(ValueError, match="share=1.5: must be a number from 0 to 1"):
        mixed(pair, share=1.5)


def test_solutions_are_found_under_the_prompts_format(pair):
    told = PromptFormat(system="Add.")
    sampler = mixed(pair, share=1.0, prompt_format=told)
    ids = encode_prompts(pair.tokenizer, pair.task.train["prompt"][:2], told)
    assert sampler.sample(ids).texts(pair.tokenizer) == pair.task.train["solution"][:2]


def test_sync_reaches_the_wrapped_sampler(pair):
    sampler = mixed(pair)
    other = copy.deepcopy(pair.student)
    sampler.sync(other)
    assert sampler.sampler.model is other
    assert sampler.tokenizer is pair.tokenizer and sampler.eos_token_ids == sampler.sampler.eos_token_ids


class Kept(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(dict(logs))


class Recorded(MixedSampler):
    """Keeps what each step was given."""

    def sample(self, prompts, **settings):
        rollouts = super().sample(prompts, **settings)
        self.kept = [*getattr(self, "kept", []), (self.step, is_given(rollouts), rollouts)]
        return rollouts


def trainer_of(folder, pair, objective, sampler, **changes):
    seen = Kept()
    trainer = OPRDTrainer(
        model=pair.student.requires_grad_(True),
        teacher=Teacher(pair.teacher, pair.teacher_tokenizer),
        objective=objective,
        args=short_run(folder, **changes),
        train_dataset=pair.task.train.select(range(64)),
        processing_class=pair.tokenizer,
        sampler=sampler,
        callbacks=[seen],
    )
    return trainer, seen


def recorded(pair, share=0.5, until=None):
    return Recorded(HFSampler(pair.student, pair.tokenizer), pair.task.train, share, until)


def test_the_log_counts_what_was_given_and_describes_the_rest(pair, tmp_path):
    sampler = recorded(pair, until=2)
    trainer, seen = trainer_of(tmp_path, pair, Representation() + FullKL(), sampler)
    trainer.train()
    assert [step for step, _, _ in sampler.kept] == [0, 1, 2]
    for logs, (_, given, rollouts) in zip(seen.logs, sampler.kept, strict=True):
        assert logs["rollout/given"] == pytest.approx(given.float().mean().item())
        own = rollouts.response_lengths[~given].float().mean().item()
        assert logs["response_length/mean"] == pytest.approx(own)
        assert logs["sampler/logprob_gap"] < 1e-4
    assert 0 < seen.logs[0]["rollout/given"] < 1 and seen.logs[2]["rollout/given"] == 0
    assert trainer.eval_sampler is sampler.sampler


def test_given_solutions_are_no_right_answers_of_the_student(pair, tmp_path):
    trainer, seen = trainer_of(tmp_path, pair, CrossEntropy(), recorded(pair, share=1.0), max_steps=1)
    trainer.train()
    (logs,) = seen.logs
    assert logs["rollout/given"] == 1
    assert not {"rollout/accuracy", "response_length/mean", "sampler/logprob_gap"} & logs.keys()


def test_a_resumed_run_is_given_the_same_responses(pair, tmp_path):
    settings = dict(save_strategy="steps", save_steps=1, max_steps=3)
    whole = recorded(pair)
    trainer_of(tmp_path, pair, Representation(), whole, **settings)[0].train()
    again = embedded("same")
    resumed = recorded(again)
    trainer = trainer_of(tmp_path, again, Representation(), resumed, **settings)[0]
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [step for step, _, _ in resumed.kept] == [1, 2]
    for (_, first, before), (_, second, after) in zip(whole.kept[1:], resumed.kept, strict=True):
        assert torch.equal(first, second) and torch.equal(before.input_ids[first], after.input_ids[second])


@pytest.mark.parametrize(
    "objective",
    [SampledTokenKL(), FullKL() + TaskReward(baseline="none"), Weighted(SampledTokenKL())],
    ids=["sampled token", "reward", "weighted"],
)
def test_estimates_from_own_samples_are_refused(objective, pair, tmp_path):
    with pytest.raises(ValueError, match="is an estimate from the student's own samples"):
        trainer_of(tmp_path, pair, objective, mixed(pair))


def asked(**settings):
    return TrainArguments("embedded/student", "embedded/teacher", "arithmetic", **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(given_share=2.0), "given_share=2.0: must be a number from 0 to 1"),
        (dict(given_until=9), "given_until=9: nothing is given"),
        (dict(method="sft", given_share=0.5), "sft learns from solutions alone"),
        (dict(method="opd-sampled", given_share=0.5), "own samples"),
        (dict(method="opd-full", reward=1.0, given_share=0.5), "own samples"),
    ],
    ids=["above 1", "until alone", "part of sft", "sampled token", "reward"],
)
def test_requests_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_methods(asked(**settings))
    check_given_request(asked(method="sft", then="oprd", given_share=0.25, given_until=3))


def test_solutions_first_then_distillation_in_one_command(tmp_path):
    argv = "embedded/student embedded/teacher arithmetic --method sft --then oprd --max_steps 6 --limit 8 "
    argv += "--max_completion_length 40 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 "
    argv += "--learning_rate 1e-5 --use_cpu True --bf16 False --num_generations 1 --disable_tqdm True"
    run = tmp_path / "run"
    assert main(["train", *argv.split(), "--output_dir", str(run)]) == 0
    methods = [yaml.safe_load((f / "config.yaml").read_text())["method"] for f in (run / "1-sft", run)]
    assert methods == ["sft", "oprd"]
    first, second = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run / "1-sft", run)
    )
    assert all(line["rollout/given"] == 1 for line in first if "loss" in line)
    assert all("rollout/given" not in line for line in second)
    entropies = [line["sft/cross_entropy"] for line in first if "loss" in line]
    assert entropies[-1] < entropies[0]
