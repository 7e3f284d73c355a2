"""Turns and tools: what a tool wrote is read by both models, and supervised by nothing."""

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_training import train

from oprd_nb.core import Positions, Rollouts
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives import CrossEntropy, FullKL, Representation, SampledTokenKL, TaskReward, TopKKL
from oprd_nb.objectives.objective import loss_of
from oprd_nb.pairing.positions import pair_positions, pair_prompted
from oprd_nb.probing.states import read_batches
from oprd_nb.rollouts.samplers import HFSampler, ReplaySampler, response_log_probs
from oprd_nb.rollouts.turns import ToolSampler, calculator, call_tool, calls_of, tool_ids, turns_of
from oprd_nb.teachers import Teacher
from oprd_nb.training.steps import rollouts_of

HEAD_TERMS = {
    "full": FullKL(),
    "forward": FullKL("forward"),
    "top-k": TopKKL(4),
    "sampled": SampledTokenKL(),
    "cross-entropy": CrossEntropy(),
    "reward": TaskReward(reward=lambda text, answer: len(text)),
    "last": FullKL(positions="last:3"),
    "predicting": Representation(layers="last", predicting=True),
}
STATE_TERMS = {
    "representation": Representation(layers="last"),
    "mse": Representation(layers="last", distance="mse"),
    "last": Representation(layers="last", positions="last:3"),
}


def with_tool(pair, **options):
    """A sampler with a calculator."""
    return ToolSampler(HFSampler(pair.student, pair.tokenizer), calculator, **(dict(max_turns=3) | options))


@pytest.fixture(scope="module")
def pair():
    return embedded("same")


@pytest.fixture(scope="module")
def written(pair):
    """Eight rollouts, two per prompt, in which a calculator answered."""
    rollouts = with_tool(pair).sample(pair.task.test["prompt"][:4], n=2, max_new_tokens=48, seed=0)
    assert int(calls_of(rollouts).sum()) >= 8
    return rollouts


def last_states(pair, term, rollouts):
    """The loss, and its gradient with respect to the states of the last layer: (batch, time, d)."""
    kept = []

    def keep(module, args, states):
        states.retain_grad()
        kept.append(states)

    pair.student.requires_grad_(True)
    hook = pair.student.get_decoder().norm.register_forward_hook(keep)
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer)
    loss, _ = loss_of(term, pair.student, teacher, rollouts, pair.tokenizer)
    hook.remove()
    loss.backward()
    pair.student.zero_grad()
    return loss.detach(), kept[0].grad


def naive_mask(rollouts, spec, predicting):
    """The supervised positions, token by token."""
    chosen = torch.zeros_like(rollouts.response_mask)
    for i, row in enumerate(rollouts.response_mask.tolist()):
        own = [t for t, is_own in enumerate(row) if is_own]
        for t in own if spec == "all" else own[-3:]:
            chosen[i, t - predicting] = True
    return chosen


@pytest.mark.parametrize("name", HEAD_TERMS)
def test_no_logits_are_asked_for_a_tool_s_token(name, pair, written):
    term = HEAD_TERMS[name]
    rollouts = replace(written, columns={"answer": ["1"] * len(written)})
    _, gradient = last_states(pair, term, rollouts)
    expected = naive_mask(rollouts, "last:3" if name == "last" else "all", predicting=True)
    has_gradient = gradient.abs().sum(-1) > 0
    assert not (has_gradient & ~expected).any()
    assert has_gradient.sum() > 0.5 * expected.sum() or name == "reward"


@pytest.mark.parametrize("name", STATE_TERMS)
def test_states_at_a_tool_s_tokens_have_no_gradient(name, pair, written):
    _, gradient = last_states(pair, STATE_TERMS[name], written)
    expected = naive_mask(written, "last:3" if name == "last" else "all", predicting=False)
    assert torch.equal(gradient.abs().sum(-1) > 0, expected)


@torch.no_grad()
def test_losses_agree_with_a_naive_loop(pair, written):
    inputs = dict(input_ids=written.input_ids, attention_mask=written.attention_mask.long())
    position_ids = (written.attention_mask.cumsum(1) - 1).clamp(min=0)
    p = pair.student(**inputs, position_ids=position_ids).logits.log_softmax(-1)
    q = pair.teacher(**inputs, position_ids=position_ids).logits.log_softmax(-1)
    losses = {"full": [], "cross-entropy": [], "forward": []}
    for i, row in enumerate(written.response_mask.tolist()):
        for t, is_own in enumerate(row):
            if is_own:
                before = t - 1
                a, b = p[i, before], q[i, before]
                losses["full"].append((a.exp() * (a - b)).sum())
                losses["forward"].append((b.exp() * (b - a)).sum())
                losses["cross-entropy"].append(-a[written.input_ids[i, t]])
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer)
    for name, values in losses.items():
        loss, _ = loss_of(HEAD_TERMS[name], pair.student, teacher, written, pair.tokenizer)
        assert loss.item() == pytest.approx(torch.stack(values).mean().item(), rel=1e-4)


def test_what_a_tool_wrote_changes_no_target(pair, written):
    """Other tokens in the tool's last answer, after which nothing of the student's follows: the same loss."""
    cut = []
    for ids, own in zip(written.completions(), written.written(), strict=True):
        end = max(t for t in range(1, len(own)) if own[t - 1] and not own[t]) if not all(own) else len(own)
        cut.append((ids[:end], own[:end]))
    losses = []
    for answer in (6, 9):
        rollouts = Rollouts.from_ids(
            written.prompt_ids(),
            [ids + [answer] * 3 for ids, _ in cut],
            0,
            written=[own + [False] * 3 for _, own in cut],
        )
        losses.append([last_states(pair, term, rollouts)[0] for term in (FullKL(), Representation())])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("n", [1, 2])
def test_a_tool_that_is_never_called_changes_no_bit(n, pair):
    prompts = pair.task.test["prompt"][:6]
    plain = HFSampler(pair.student, pair.tokenizer)
    options = dict(n=n, max_new_tokens=40, seed=5, top_p=0.9)
    expected = plain.sample(prompts, **options)
    for sampler in (ToolSampler(plain, calculator, stop="?"), ToolSampler(plain, calculator, max_turns=1)):
        found = sampler.sample(prompts, **options)
        for name in ("input_ids", "attention_mask", "response_mask", "log_probs"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        assert found.prompts == expected.prompts and found.columns == {"tool_errors": [0] * len(found)}


def test_a_seed_gives_the_same_rollouts_and_its_log_probs_are_the_students(pair, written):
    prompts = pair.task.test["prompt"][:4]
    again = with_tool(pair).sample(prompts, n=2, max_new_tokens=48, seed=0)
    assert torch.equal(again.input_ids, written.input_ids)
    assert (
        with_tool(pair).sample(prompts, n=2, max_new_tokens=48, seed=1).completions() != again.completions()
    )
    assert torch.allclose(written.log_probs, response_log_probs(pair.student, written), atol=1e-5)
    assert not written.log_probs[~written.response_mask].any()


def test_answers_stand_where_they_were_asked_for(pair, written):
    for text in pair.tokenizer.batch_decode(written.completions(), skip_special_tokens=True):
        for line in text.split("\n"):
            if "=" in line and "boxed" not in line:
                asked, _, answer = line.partition("=")
                assert answer.startswith(calculator(asked + "="))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 4))
def test_bounds_hold(length, turns, most):
    pair = SHARED
    sampler = with_tool(pair, max_turns=turns, max_tool_tokens=most)
    rollouts = sampler.sample(pair.task.test["prompt"][:3], max_new_tokens=length, seed=0)
    assert max(map(len, rollouts.completions())) <= length
    assert int(turns_of(rollouts).max()) <= turns and int(turns_of(rollouts).min()) >= 1
    assert torch.equal(calls_of(rollouts), turns_of(rollouts) - 1)
    # The student has the last word, and no answer is longer than allowed.
    for own in rollouts.written():
        assert own[-1]
        runs = "".join("w" if is_own else "t" for is_own in own).split("w")
        assert max(map(len, runs)) <= most


SHARED = embedded("same")


def test_two_tools_are_two_wrappers(pair):
    inner = with_tool(pair)
    both = ToolSampler(inner, lambda text: "0", stop="\n", max_turns=2)
    rollouts = both.sample(pair.task.test["prompt"][:2], max_new_tokens=48, seed=0)
    assert int(calls_of(rollouts).max()) >= 2
    texts = pair.tokenizer.batch_decode(rollouts.completions())
    assert any("\n0" in text for text in texts)
    # A tool's text is no call of another tool.
    lines = ToolSampler(HFSampler(pair.student, pair.tokenizer), lambda text: "1\n2", max_turns=2)
    never = ToolSampler(lines, boom, stop="\n2", max_turns=2)
    rollouts = never.sample(pair.task.test["prompt"][:2], max_new_tokens=40, seed=0)
    assert int(calls_of(rollouts).sum()) > 0 and sum(rollouts.columns["tool_errors"]) == 0


def boom(text):
    raise RuntimeError("out of order")


def leaves(text):
    raise SystemExit(3)


@pytest.mark.parametrize("tool", [boom, leaves, lambda text: None, lambda text: "", lambda text: 7])
def test_an_error_is_an_answer_and_is_counted(tool, pair):
    sampler = ToolSampler(HFSampler(pair.student, pair.tokenizer), tool, max_turns=2, max_tool_tokens=3)
    rollouts = sampler.sample(pair.task.test["prompt"][:3], max_new_tokens=40, seed=0)
    assert rollouts.columns["tool_errors"] == calls_of(rollouts).tolist()
    assert sum(rollouts.columns["tool_errors"]) > 0


def test_a_tool_that_does_not_return_is_left():
    released = threading.Event()
    answer = call_tool(lambda text: str(released.wait(20)), "1+1=", 0.05)
    released.set()
    assert answer.failed and "no answer in 0.05 s" in answer.text


def test_a_tool_cannot_write_a_special_token(pair):
    assert pair.tokenizer.eos_token_id not in tool_ids("1<|end|>", pair.tokenizer, 64)


@pytest.mark.parametrize(
    "text", ["__import__('os')=", "2**9=", "1/0=", "=", "1+=", "9999999999=", "٣+1=", "1 + 1="]
)
def test_the_calculator_reads_sums_and_nothing_else(text):
    with pytest.raises(ValueError, match="no sum"):
        calculator(text)


@given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 999)), min_size=1, max_size=6))
def test_the_calculator_is_right(parts):
    line = "".join(f"{sign}{number}" for sign, number in parts)[1:]
    assert calculator(f"1+1=2\n{line}=") == str(naive_value(line))


def naive_value(line):
    """Products first, then from left to right."""
    number, total, product, sign = "", 0, None, 1
    for character in line + "+":
        if character.isdigit():
            number += character
            continue
        product = int(number) if product is None else product * int(number)
        number = ""
        if character != "*":
            total += sign * product
            product, sign = None, 1 if character == "+" else -1
    return total


@pytest.mark.parametrize(
    "options", [dict(stop=""), dict(max_turns=0), dict(max_tool_tokens=0), dict(seconds=-1)]
)
def test_a_setting_that_cannot_be_meant_is_named(options, pair):
    with pytest.raises(ValueError, match=next(iter(options))):
        with_tool(pair, **options)


# What the teacher reads.


def test_the_teacher_reads_the_same_tokens(pair, written):
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer)
    read = teacher.read(written, pair.tokenizer).teacher_inputs
    assert torch.equal(read.input_ids, written.input_ids)
    assert torch.equal(read.attention_mask, written.attention_mask)


def test_a_teacher_with_another_prompt_reads_what_the_tool_wrote(pair, written):
    prompts = [[{"role": "user", "content": "1+" + p[0]["content"]}] for p in written.prompts]
    pairs = pair_prompted(written, prompts, pair.tokenizer)
    for read, ids in zip(pairs.teacher_inputs.input_ids, written.completions(), strict=True):
        kept = read[read != 0].tolist()
        assert kept[-len(ids) :] == ids
    assert torch.equal(pairs.paired & written.response_mask, written.response_mask)
    tokens = pairs.teacher_inputs.input_ids.flatten()[pairs.teacher_rows_at(pairs.student_rows)]
    own = written.response_mask.flatten()[pairs.student_rows]
    assert torch.equal(tokens[own], written.input_ids.flatten()[pairs.student_rows][own])


def test_across_tokenizers_the_teacher_reads_the_tools_text_and_only_the_student_s_is_paired():
    other = embedded("cross_tokenizer")
    rollouts = with_tool(other).sample(other.task.test["prompt"][:4], max_new_tokens=48, seed=0)
    assert int(calls_of(rollouts).sum()) > 3
    pairs = pair_positions(rollouts, other.tokenizer, other.teacher_tokenizer)
    texts = [
        tokenizer.batch_decode(batch.completions(), skip_special_tokens=True)
        for tokenizer, batch in ((other.tokenizer, rollouts), (other.teacher_tokenizer, pairs.teacher_inputs))
    ]
    assert texts[0] == texts[1]
    compared = rollouts.response_mask | Positions("all", predicting=True).mask(rollouts.response_mask)
    assert not (pairs.paired & ~compared).any()
    assert pairs.coverage == 1
    # At a shared boundary both have read the same text: the whole of it, a tool's answers included.
    for row in range(len(rollouts)):
        for t in (pairs.paired[row] & (pairs.offsets[row] == 0)).nonzero().flatten().tolist():
            upto = int(pairs.teacher_positions[row, t]) + 1
            student = other.tokenizer.decode(rollouts.input_ids[row, : t + 1], skip_special_tokens=True)
            teacher = other.teacher_tokenizer.decode(
                pairs.teacher_inputs.input_ids[row, :upto], skip_special_tokens=True
            )
            assert student == teacher


# Rollouts without a token of the student's.


def with_silent(written):
    """The rollouts with one in front that is a tool's text only."""
    ids = [written.completions()[0], *written.completions()]
    own = [[False] * len(ids[0]), *written.written()]
    prompts = [written.prompt_ids()[0], *written.prompt_ids()]
    return Rollouts.from_ids(prompts, ids, 0, written=own)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize(
    "term", [FullKL(), Representation(), SampledTokenKL(), TopKKL(4)], ids=lambda t: t.name
)
def test_a_rollout_of_tool_text_only_is_left_out(term, reduction, pair, written):
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer)
    objective = term.as_objective().with_reduction(reduction)
    losses = [
        loss_of(objective, pair.student, teacher, rollouts, pair.tokenizer)[0].item()
        for rollouts in (written, with_silent(written))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    silent = with_silent(written).select([0])
    assert turns_of(silent).tolist() == [0] and silent.truncated([2]).tolist() == [True]
    assert loss_of(objective, pair.student, teacher, silent, pair.tokenizer)[0].item() == 0


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 13))
def test_last_k_counts_the_student_s_own_tokens(own, k):
    rollouts = Rollouts.from_ids([[1]], [list(range(5, 5 + len(own)))], 0, written=[own])
    expected = [t + 1 for t, is_own in enumerate(own) if is_own][-k:]
    assert Positions(f"last:{k}").mask(rollouts.response_mask)[0].nonzero().flatten().tolist() == expected
    assert rollouts.response_lengths.tolist() == [sum(own)]
    # Runs of the student's, counted by hand.
    assert turns_of(rollouts).item() == sum(a and not b for a, b in zip(own, [False, *own[:-1]], strict=True))


# Files, replays, other readers.


def test_files_keep_the_mask_and_old_ones_are_read(written, tmp_path):
    stored = Rollouts.load(written.save(tmp_path / "turns.safetensors"))
    assert torch.equal(stored.response_mask, written.response_mask) and stored.columns == written.columns
    old = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.bool)}
    old["response_mask"] = torch.tensor([[False, True, True]])
    metadata = {"kind": "oprd_nb.rollouts", "prompts": "null"}
    save_file(old, tmp_path / "old.safetensors", metadata=metadata)
    before = Rollouts.load(tmp_path / "old.safetensors")
    assert before.written() == [[True, True]] and turns_of(before).tolist() == [1]


def test_a_replay_keeps_the_mask(pair, written):
    replayed = ReplaySampler(written, pair.tokenizer).sample(pair.task.test["prompt"][:4], n=2)
    for name in ("input_ids", "attention_mask", "response_mask", "log_probs"):
        assert torch.equal(getattr(replayed, name), getattr(written, name))


def test_probing_reads_what_the_tool_wrote(written):
    batches = list(read_batches(lambda number, batch: batch, written, 0, 200))
    assert len(batches) > 1
    assert [ids for batch in batches for ids in batch.completions()] == written.completions()
    assert [own for batch in batches for own in batch.written()] == written.written()


def test_written_must_fit(written):
    with pytest.raises(ValueError, match="written: lengths differ"):
        Rollouts.from_ids([[1]], [[5, 6]], 0, written=[[True]])


# Training.


def test_training_supervises_the_student_s_tokens_alone(same, tmp_path):
    """The gradient of a step is that of `loss_of` on the same rollouts; turns and calls are in the log."""
    prompts = same.task.train["prompt"][:8]
    stored = with_tool(same).sample(prompts, max_new_tokens=40, seed=1)
    replay = ReplaySampler(stored, same.tokenizer)
    changes = dict(prompts=8, per_device_train_batch_size=8, max_grad_norm=0.0, logprob_tolerance=1e-3)
    _, seen = train(tmp_path, same, FullKL(), sampler=replay, **changes)
    fresh = embedded("same")
    fresh.student.requires_grad_(True)
    teacher = Teacher(fresh.teacher, fresh.teacher_tokenizer)
    loss_of(FullKL(), fresh.student, teacher, stored, fresh.tokenizer)[0].backward()
    for name, parameter in fresh.student.named_parameters():
        assert torch.allclose(seen.kept[name], parameter.grad, atol=1e-5), name
    line = next(line for line in seen.logs if "rollout/turns" in line)
    assert line["rollout/turns"] == pytest.approx(turns_of(stored).float().mean().item())
    assert line["rollout/tool_calls"] == pytest.approx(calls_of(stored).float().mean().item())
    assert line["response_length/mean"] == pytest.approx(stored.response_lengths.float().mean().item())
    assert line["response/not_written"] == 0
    by_turns = {name: value for name, value in line.items() if name.startswith("rollout/accuracy/turns_")}
    assert set(by_turns) == {f"rollout/accuracy/turns_{t}" for t in set(turns_of(stored).tolist())}


def test_training_with_a_tool_logs_its_errors_and_repeats_itself(tmp_path):
    lines = []
    for number in range(2):
        pair = embedded("same")
        broken = with_tool(pair, max_tool_tokens=3)
        broken.tool = lambda text: calculator(text) if text.count("=") == 1 else boom(text)
        changes = dict(max_steps=2, prompts=16, per_device_train_batch_size=8)
        folder = tmp_path / str(number)
        _, seen = train(folder, pair, Representation(), sampler=broken, **changes)
        lines.append([(line["loss"], line["rollout/tool_errors"]) for line in seen.logs if "loss" in line])
    assert lines[0] == lines[1]
    assert 0 < lines[0][0][1] < 1


def test_a_sampler_with_a_tool_and_tools_of_trl_are_refused_together(same, tmp_path):
    trainer, _ = train(tmp_path, same, FullKL(), prompts=8, per_device_train_batch_size=8)
    trainer.tools = [calculator]
    with pytest.raises(ValueError, match="tools: the sampler calls a tool already"):
        trainer._see_tools(with_tool(same).sample(same.task.test["prompt"][:2], max_new_tokens=40))


def test_trl_s_own_tool_mask_reaches_every_objective():
    batch = {
        "prompt_ids": torch.tensor([[1, 2]]),
        "prompt_mask": torch.tensor([[1, 1]]),
        "completion_ids": torch.tensor([[5, 6, 7, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1]]),
    }
    rollouts = rollouts_of(batch)
    assert rollouts.completions() == [[5, 6, 7]] and rollouts.written() == [[True, False, True]]
    assert turns_of(rollouts).tolist() == [2]
