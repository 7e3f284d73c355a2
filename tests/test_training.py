"""The trainer: the identity on the whole path, accumulation, what is frozen, what is written, errors."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from short_runs import short_run
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import DistillationTrainer

from oprd_nb.bridge.pca import Bridge
from oprd_nb.core import Rollouts
from oprd_nb.models.loading import load_model
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.output_space import FullKL, SampledTokenKL, TopKKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.rollouts.prompts import encode_prompts
from oprd_nb.rollouts.samplers import HFSampler, ReplaySampler
from oprd_nb.structure.moments import Moments
from oprd_nb.teachers import Teacher
from oprd_nb.training.config import check_trl
from oprd_nb.training.reach import freeze_unused
from oprd_nb.training.trainer import OPRDTrainer

TERMS = [
    Representation(positions="last:9"),
    Representation(positions="last:9", distance="mse"),
    Representation(layers="2,4", positions="first:3", distance="cosine"),
    SampledTokenKL(),
    SampledTokenKL(control_variate=True),
    TopKKL(4),
    TopKKL(4, renormalize=False),
    FullKL(),
    FullKL("forward", positions="last:30%"),
    FullKL("jsd"),
]


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step and every logged line."""

    def __init__(self):
        self.kept, self.logs = None, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if self.kept is None:
            self.kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(logs)


def config(folder, **changes):
    settings = dict(max_steps=1, per_device_train_batch_size=64, weight_decay=0.0, max_grad_norm=0.0)
    return short_run(folder, **(settings | changes))


def train(folder, pair, objective, sampler=None, prompts=64, peft_config=None, teacher=None, **changes):
    """One short run; returns the trainer and what the callback saw."""
    seen = Gradients()
    trainer = OPRDTrainer(
        model=pair.student.requires_grad_(True),
        teacher=teacher or Teacher(pair.teacher, pair.teacher_tokenizer),
        objective=objective,
        args=config(folder, **changes),
        train_dataset=pair.task.train.select(range(prompts)),
        processing_class=pair.tokenizer,
        sampler=sampler,
        peft_config=peft_config,
        callbacks=[seen],
    )
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_student_that_is_its_teacher_has_nothing_to_learn(term, same, tmp_path):
    teacher = Teacher(embedded("same").student, same.tokenizer)
    _, seen = train(tmp_path, same, term, teacher=teacher)
    loss = next(logs["loss"] for logs in seen.logs if "loss" in logs)
    exact = isinstance(term, Representation) and "mse" in term.distance
    assert loss == 0 if exact else abs(loss) <= 1e-6
    largest = max(g.abs().max().item() for g in seen.kept.values())
    # Without renormalisation the gradient at p = q is that of the top-k mass; see test_objectives.py.
    assert largest <= 1e-6 or (isinstance(term, TopKKL) and not term.renormalize)


@pytest.fixture(scope="module")
def stored():
    """Responses of very different lengths to 64 prompts, for both pairs: half of them cut."""
    pair = embedded("same")
    rollouts = HFSampler(pair.student, pair.tokenizer).sample(
        pair.task.train["prompt"][:64], max_new_tokens=40
    )
    responses = [r[: 3 + i % 17] if i % 2 else r for i, r in enumerate(rollouts.responses())]
    return Rollouts.from_ids(rollouts.prompt_ids(), responses, 0)


@pytest.mark.parametrize(
    "name, term",
    [("same", t) for t in TERMS]
    + [
        ("cross_tokenizer", Representation(positions="last:9")),
        ("cross_tokenizer", Representation(layers="3")),
    ],
    ids=lambda x: x if isinstance(x, str) else repr(x),
)
def test_accumulation_changes_nothing(name, term, stored, tmp_path):
    """1 x 64 and 4 x 16 give the same gradients, though micro-batches differ in positions."""
    gradients = []
    for size, steps in ((64, 1), (16, 4)):
        pair = embedded(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            _, seen = train(
                tmp_path,
                pair,
                term,
                ReplaySampler(stored, pair.tokenizer),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
            )
        gradients.append(seen.kept)
    whole, pieces = gradients
    assert whole.keys() == pieces.keys()
    for key, value in whole.items():
        torch.testing.assert_close(
            pieces[key], value, rtol=1e-4, atol=1e-5 * max(1.0, value.abs().max().item()), msg=key
        )


@pytest.mark.parametrize("budget", [200, 900])
def test_a_token_budget_changes_nothing(name_and_budget_term, budget, stored, tmp_path):
    """Cut by length and trimmed, a batch gives the gradients, the loss and the metrics of the whole one."""
    name, term = name_and_budget_term
    runs = []
    for tokens in (0, budget):
        pair = embedded(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            trainer, seen = train(
                tmp_path / str(tokens), pair, term, ReplaySampler(stored, pair.tokenizer), token_budget=tokens
            )
        runs.append((seen.kept, next(line for line in trainer.state.log_history if "loss" in line)))
    for key, value in runs[0][0].items():
        torch.testing.assert_close(
            runs[1][0][key], value, rtol=1e-4, atol=1e-5 * max(1.0, value.abs().max().item()), msg=key
        )
    for metric in ("loss", *(m for m in runs[0][1] if m.startswith(("rep/", "full/")))):
        assert runs[1][1][metric] == pytest.approx(runs[0][1][metric], rel=1e-4, abs=1e-6), metric


@pytest.fixture(params=["same", "cross_tokenizer"])
def name_and_budget_term(request):
    return request.param, FullKL() + 2 * Representation(
        positions="last:5"
    ) if request.param == "same" else Representation(positions="all")


def test_sequence_reduction_survives_accumulation(same, stored, tmp_path):
    objective = (FullKL() + 3 * Representation(positions="all")).with_reduction("sequence")
    gradients = [
        train(
            tmp_path,
            embedded("same"),
            objective,
            ReplaySampler(stored, same.tokenizer),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=64 // size,
        )[1].kept
        for size in (64, 8)
    ]
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_weight_decay_does_not_move_what_gets_no_gradient(same, tmp_path):
    before = {name: p.clone() for name, p in same.student.named_parameters()}
    train(tmp_path, same, Representation(layers="2"), weight_decay=0.5, max_steps=2)
    moved = {name for name, p in same.student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(
        name.startswith(("model.embed_tokens", "model.layers.0.", "model.layers.1.")) for name in moved
    )


def test_tied_head_stays_trainable():
    from conftest import tiny_qwen3

    model = tiny_qwen3(tie=True)
    assert freeze_unused(model, Representation()) == [] and model.lm_head.weight.requires_grad


def test_run_folder_is_plain_and_a_representation_run_logs_no_entropy(same, tmp_path):
    train(tmp_path, same, Representation(positions="all"), max_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2] and steps[0]["seconds"] < steps[1]["seconds"]
    expected = {
        "rep/cosine_similarity",
        "rep/cosine_layer_4",
        "response_length/mean",
        "response/truncated",
        "time/rollout",
        "time/teacher",
        "time/update",
        "memory/delta_peak",
        "learning_rate",
        "pairing/coverage",
    }
    assert expected <= steps[0].keys() and not any("entropy" in name for name in steps[0])
    assert all(steps[0][name] >= 0 for name in ("time/rollout", "time/teacher", "time/update"))
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert settings["learning_rate"] == 1e-3 and settings["max_steps"] == 2
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["responses_per_step"] == 64 and "Representation" in about["objective"][0]


def test_evaluation_reports_accuracy_and_output_diagnostics(same, tmp_path):
    trainer = OPRDTrainer(
        model=same.student,
        teacher=Teacher(same.teacher, same.tokenizer),
        objective=FullKL(),
        args=config(tmp_path),
        train_dataset=same.task.train,
        eval_dataset=same.task.validation.select(range(40)),
        processing_class=same.tokenizer,
    )
    metrics = trainer.evaluate()
    assert (
        0 <= metrics["eval_avg@1"] <= 0.5
        and metrics["actor/entropy"] > 0
        and 0 <= metrics["topk/overlap_ratio"] <= 1
    )
    assert 0.5 < metrics["rep/cosine_similarity"] < 1 and "rep/cosine_layer_4" in metrics, (
        "no term of this objective logs cosines, so they are measured here"
    )


def test_signal_and_noise_of_accumulated_gradients(same, tmp_path):
    train(
        tmp_path,
        same,
        Representation(positions="all"),
        per_device_train_batch_size=16,
        gradient_accumulation_steps=4,
        max_steps=3,
        logging_steps=1,
    )
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad/snr"] > 1 for line in steps if "loss" in line), "early steps all point the same way"
    train(
        tmp_path,
        same,
        Representation(positions="all"),
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        max_steps=1,
    )
    assert "grad/snr" not in (tmp_path / "metrics.jsonl").read_text(), (
        "one micro-batch cannot tell them apart"
    )


def test_several_generations_of_a_prompt(same, tmp_path):
    seen = []

    class Counting(HFSampler):
        def sample(self, prompts, **options):
            seen.extend(map(tuple, prompts))
            return super().sample(prompts, **options)

    train(
        tmp_path,
        same,
        FullKL(),
        Counting(same.student, same.tokenizer),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=2,
    )
    assert len(seen) == 8 and len(set(seen)) == 4 and all(seen[i] == seen[i + 1] for i in range(0, 8, 2))


def test_sampling_settings_reach_a_sampler_and_the_run_folder(same, tmp_path):
    seen = []

    class Listening(HFSampler):
        def sample(self, prompts, **options):
            seen.append(options)
            return super().sample(prompts, **options)

    def settings(**options):
        sampler = Listening(same.student, same.tokenizer)
        train(tmp_path, same, FullKL(), sampler, per_device_train_batch_size=2, **options)

    settings(top_p=0.9, top_k=5, min_p=0.01, repetition_penalty=1.1, generation_kwargs={"stop_strings": "="})
    expected = {"top_p": 0.9, "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "stop": ("=",), "n": 1}
    assert {name: seen[0][name] for name in expected} == expected
    about = json.loads((tmp_path / "about.json").read_text())
    assert "top_p 0.9, top_k 5, min_p 0.01, repetition_penalty 1.1, stop at '='" in about["sampling"]
    for wrong in ({"generation_kwargs": {"typical_p": 0.9}}, {"top_p": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            settings(**wrong)


class PartlyStale(HFSampler):
    """Says of every fourth token of the last response that it was likelier than it was, by 5 nats."""

    def sample(self, prompts, **options):
        rollouts = super().sample(prompts, **options)
        places = rollouts.response_mask[-1].nonzero()[::4]
        rollouts.log_probs[-1, places] += 5
        return rollouts


def test_the_sampler_is_compared_on_all_responses_and_its_worst_tokens_are_logged(same, tmp_path):
    sampler = PartlyStale(same.student, same.tokenizer)
    settings = dict(max_steps=1, logprob_tolerance=10, per_device_train_batch_size=8)
    _, seen = train(tmp_path, same, FullKL(), sampler, **settings)
    logged = next(line for line in seen.logs if "sampler/logprob_gap" in line)
    assert 0 < logged["sampler/logprob_gap"] < 1
    assert logged["sampler/logprob_gap_p99"] == pytest.approx(5, abs=1e-3)
    with pytest.raises(RuntimeError, match="sampler/logprob_gap=.*does not use the student's weights"):
        train(tmp_path, same, FullKL(), sampler, **settings | {"logprob_tolerance": None})


def test_bfloat16_and_gradient_checkpointing(same, tmp_path):
    _, seen = train(
        tmp_path,
        same,
        SampledTokenKL() + 10 * Representation(),
        bf16=True,
        gradient_checkpointing=True,
        per_device_train_batch_size=16,
    )
    assert all(torch.isfinite(g).all() for g in seen.kept.values())


def test_lora_moves_only_adapters(same, tmp_path):
    before = {name: p.clone() for name, p in same.student.named_parameters()}
    trainer, seen = train(
        tmp_path,
        same,
        Representation(positions="all") + FullKL(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
        max_steps=2,
    )
    assert all("lora_" in name for name in seen.kept)
    base = trainer.model.get_base_model()
    assert all(
        torch.equal(p, before[name.replace(".base_layer", "")])
        for name, p in base.named_parameters()
        if "lora_" not in name
    )


def test_resume_continues_the_run(tmp_path):
    def run(folder, resume=None, **changes):
        pair = embedded("same")
        trainer = OPRDTrainer(
            model=pair.student,
            teacher=Teacher(pair.teacher, pair.tokenizer),
            objective=FullKL(),
            processing_class=pair.tokenizer,
            args=config(
                folder,
                max_steps=4,
                per_device_train_batch_size=8,
                save_strategy="steps",
                save_steps=2,
                **changes,
            ),
            train_dataset=pair.task.train,
            sampler=HFSampler(pair.student, pair.tokenizer),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = run(tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    resumed = run(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"))
    again = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-7, msg=name)
    assert [json.loads(line)["step"] for line in again] == [json.loads(line)["step"] for line in lines]


def test_a_fully_truncated_batch_trains(same, tmp_path):
    _, seen = train(
        tmp_path,
        same,
        SampledTokenKL() + Representation(),
        max_completion_length=1,
        per_device_train_batch_size=8,
    )
    logs = next(logs for logs in seen.logs if "loss" in logs)
    assert logs["response/truncated"] > 0.9 and all(torch.isfinite(g).all() for g in seen.kept.values())


def test_an_empty_response_is_named(same, tmp_path):
    class Silent(HFSampler):
        def _generate(self, model, prompts, *_):
            return [([], []) for _ in prompts]

    with pytest.raises(ValueError, match=r"response_ids\[0\] is empty"):
        train(tmp_path, same, FullKL(), Silent(same.student, same.tokenizer), per_device_train_batch_size=4)


def test_a_run_without_supervised_positions_ends(same, tmp_path):
    """A bridge with maps at offsets that a shared tokenizer never has."""
    width = same.student.config.hidden_size
    bridge = random_bridge(width, width, seed=0)
    bridge.header = replace(bridge.header, offsets=(3,))
    objective = Representation(layers="1", bridge=bridge)
    with (
        pytest.warns(UserWarning, match=r"for rep \(positions='last:2000' at byte offsets \(3,\)"),
        pytest.raises(ValueError, match="10 steps in a row without a supervised position"),
    ):
        train(tmp_path, same, objective, max_steps=12, per_device_train_batch_size=4)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) <= 9


def test_trl_moving_is_named(monkeypatch):
    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", lambda self, prompts: None)
    with pytest.raises(RuntimeError, match="_generate_single_turn no longer takes"):
        check_trl()


def test_ends_of_turn_that_never_meet_are_announced(same, tmp_path):
    same.teacher.generation_config.eos_token_id = 5
    same.teacher_tokenizer.eos_token = "<|assistant|>"
    with pytest.warns(UserWarning, match="expect ever longer responses"):
        OPRDTrainer(
            model=same.student,
            teacher=Teacher(same.teacher, same.teacher_tokenizer),
            objective=FullKL(),
            args=config(tmp_path),
            train_dataset=same.task.train,
            processing_class=same.tokenizer,
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(objective=Representation(layers="7")), "this model has layers 1 to 4"),
        (dict(train_dataset=Dataset.from_dict({"question": ["1+1"]})), "it needs 'prompt'"),
        (
            dict(train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "1+1"}]]})),
            "1 prompts, but one step takes 64",
        ),
        (dict(objective="oprd"), "objective='oprd'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(changes, message, same, tmp_path):
    options = dict(
        model=same.student,
        teacher=Teacher(same.teacher, same.tokenizer),
        objective=FullKL(),
        args=config(tmp_path / "run"),
        train_dataset=same.task.train,
        processing_class=same.tokenizer,
    )
    with pytest.raises(ValueError, match=message):
        OPRDTrainer(**(options | changes))
    assert not (tmp_path / "run").exists()


def test_pairs_that_need_something_else_say_so(tmp_path):
    wide, other = embedded("cross_architecture"), embedded("cross_tokenizer")
    with pytest.raises(ValueError, match="fit a bridge"):
        train(tmp_path, wide, Representation())
    with pytest.raises(ValueError, match="different tokenizers"):
        train(tmp_path, other, FullKL())


def test_an_evaluation_samples_each_problem_once(same, tmp_path):
    """Diagnostics read the responses that were graded."""
    asked = []

    class CountingSampler(HFSampler):
        def sample(self, prompts, **options):
            asked.append(len(prompts))
            return super().sample(prompts, **options)

    trainer = OPRDTrainer(
        model=same.student,
        teacher=Teacher(same.teacher, same.tokenizer),
        objective=FullKL(),
        args=config(tmp_path),
        train_dataset=same.task.train,
        eval_dataset=same.task.validation.select(range(40)),
        processing_class=same.tokenizer,
        eval_sampler=CountingSampler(same.student, same.tokenizer),
    )
    metrics = trainer.evaluate()
    assert sum(asked) == 40
    assert "rep/cosine_similarity" in metrics


def random_bridge(width_student, width_teacher, seed):
    """A bridge of rank 2 between layers 1, fitted to noise."""
    moments = Moments([(1, 1)], width_student, width_teacher)
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(500, width_student, generator=generator)
    teacher = torch.randn(500, width_teacher, generator=generator)
    moments.update((1, 1), student, teacher)
    return Bridge.fit(moments, rank=2)


def test_two_bridges_are_refused_before_anything_is_written(tmp_path):
    pair = embedded("cross_architecture")
    widths = (pair.student.config.hidden_size, pair.teacher.config.hidden_size)
    first = Representation(layers="1", bridge=random_bridge(*widths, seed=0))
    second = Representation(layers="1", bridge=random_bridge(*widths, seed=1))
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="2 different bridges"):
        OPRDTrainer(
            model=pair.student,
            teacher=Teacher(pair.teacher, pair.teacher_tokenizer),
            objective=first + second,
            args=config(folder),
            train_dataset=pair.task.train,
            processing_class=pair.tokenizer,
        )
    assert not folder.exists()


# precision and temperature


def stored_in_bfloat16():
    """A student with SmolLM2's building blocks, four layers of them, stored in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=21,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def test_all_weights_of_a_model_stored_in_bfloat16_move(same, tmp_path):
    stored_in_bfloat16().save_pretrained(tmp_path / "stored")
    student = load_model(tmp_path / "stored", train=True)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    same.student = student
    train(tmp_path / "run", same, Representation(), max_steps=2, learning_rate=1e-5, bf16=True)
    blocks = [name for name in before if ".layers." in name]
    changed = sum(int((student.get_parameter(name) != before[name]).sum()) for name in blocks)
    assert changed >= 0.99 * sum(before[name].numel() for name in blocks)
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_trainable_parameters_in_16_bits_are_refused(same, tmp_path):
    same.student = stored_in_bfloat16()
    with pytest.raises(
        ValueError, match=r"trainable parameters are bfloat16 .*load_model\(..., train=True\)"
    ):
        train(tmp_path, same, Representation())


@pytest.mark.parametrize("bf16", [True, False])
def test_autocast_reaches_the_loss_and_the_teacher(same, tmp_path, bf16):
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            # The checks at the start read one row, without autocast.
            if len(output) > 1:
                seen.setdefault(name, set()).add(output.dtype)

        return hook

    for name, model in (("student", same.student), ("teacher", same.teacher)):
        model.model.layers[1].mlp.register_forward_hook(note(name))
    replay = ReplaySampler(
        HFSampler(same.student, same.tokenizer).sample(same.task.train["prompt"][:8], max_new_tokens=24),
        same.tokenizer,
    )
    seen.clear()
    settings = dict(bf16=bf16, per_device_train_batch_size=8, logprob_tolerance=float("inf"))
    train(tmp_path, same, Representation() + FullKL(), sampler=replay, prompts=8, **settings)
    assert seen["teacher"] == {torch.bfloat16 if bf16 else torch.float32}
    assert (torch.bfloat16 in seen["student"]) == bf16


def test_stop_texts_and_filters_without_a_sampler_reach_rollouts_and_evaluation(same, tmp_path):
    options = {"stop": ["="], "top_p": 0.9, "eval_temperature": 0.5, "grade_with": "exact"}
    trainer, _ = train(tmp_path, same, FullKL(), per_device_train_batch_size=2, **options)
    about = json.loads((tmp_path / "about.json").read_text())
    assert "top_p 0.9, stop at '='" in about["sampling"]
    assert about["eval_sampling"].startswith("temperature 0.5, top_p 0.9, stop at '='")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["stop"] == ["="]
    prompt_ids = encode_prompts(same.tokenizer, [same.task.train[0]["prompt"]] * 4)
    texts = same.tokenizer.batch_decode(trainer._generate_single_turn(prompt_ids, None, {}))
    assert all(text.count("=") == 1 and text.endswith("=") for text in texts)


def test_training_rollouts_are_graded_where_there_are_answers(same, tmp_path):
    _, seen = train(tmp_path / "with", same, Representation())
    (line,) = [line for line in seen.logs if "loss" in line]
    assert 0 < line["rollout/accuracy"] < 1 and line["rollout/accuracy"] + line["rollout/no_answer"] <= 1
    same.task.train = same.task.train.remove_columns("answer")
    _, seen = train(tmp_path / "without", same, Representation())
    (line,) = [line for line in seen.logs if "loss" in line]
    assert "rollout/accuracy" not in line


def test_no_step_is_made_at_rate_0_and_a_schedule_ends_as_it_should(same, tmp_path):
    changes = dict(max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=2)
    _, seen = train(tmp_path, same, Representation(), lr_scheduler_type="linear", **changes)
    rates = [line["learning_rate"] / 1e-3 for line in seen.logs if "loss" in line]
    assert rates == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])


def test_prompts_longer_than_the_context_are_counted_and_left_out(same, tmp_path):
    rows = [*same.task.train.select(range(64))]
    rows[3] = rows[3] | {"prompt": [{"role": "user", "content": "1+" * 5000}]}
    same.task.train = Dataset.from_list(rows)
    with pytest.warns(UserWarning, match=r"1 of 64 prompts have 256 tokens or more.*row 3 is the first"):
        trainer, _ = train(tmp_path, same, Representation(), per_device_train_batch_size=8)
    assert len(trainer.train_dataset) == 63
    same.task.train = Dataset.from_list([rows[3]] * 64)
    with pytest.raises(ValueError, match="0 prompts, but one step takes"):
        train(tmp_path / "none", same, Representation(), per_device_train_batch_size=8)


def test_one_of_several_gpus_is_used_and_the_command_for_all_is_named(same, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.warns(
        UserWarning, match="2 GPUs are visible.*accelerate launch --num_processes 2 -m oprd_nb"
    ):
        args = short_run(tmp_path, max_steps=1, use_cpu=False)
    assert args.n_gpu == 1
    trainer = OPRDTrainer(
        model=same.student,
        teacher=Teacher(same.teacher, same.teacher_tokenizer),
        objective=Representation(),
        args=args,
        train_dataset=same.task.train,
        processing_class=same.tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 1
