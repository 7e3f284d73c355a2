"""A teacher's states on disk: what the live teacher gives, from a folder, or a refusal that says why not."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from short_runs import short_run

from oprd_nb.cached import CachedTeacher, CacheWriter, read_index, write_cache
from oprd_nb.models.checks import weights_mark
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.objective import loss_of
from oprd_nb.objectives.output_space import FullKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.rollouts.samplers import HFSampler, ReplaySampler
from oprd_nb.teachers import Teacher
from oprd_nb.training.trainer import OPRDTrainer


@pytest.fixture
def written(same):
    sampler = HFSampler(same.student, same.tokenizer)
    rollouts = sampler.sample(same.task.train["prompt"][:16], max_new_tokens=24)
    teacher = Teacher(same.teacher, same.tokenizer)
    return same, teacher, [rollouts.select(range(start, start + 4)) for start in range(0, 16, 4)], rollouts


def weights_after(teacher, batches, tokenizer, steps=20, objective=None):
    student = embedded("same").student
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for step in range(steps):
        batch = batches[step % len(batches)]
        loss, _ = loss_of(objective or Representation(), student, teacher, batch, tokenizer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in student.parameters()]


@pytest.mark.parametrize(
    "term",
    [Representation(), Representation([2, 4], positions="last:5", predicting=True, distance="mse")],
    ids=["all", "chosen"],
)
def test_the_same_weights_after_twenty_steps_to_the_bit(written, tmp_path, term):
    pair, teacher, batches, _ = written
    options = dict(layers=term.layers, positions=term.positions, predicting=term.predicting)
    write_cache(tmp_path, teacher, batches, pair.tokenizer, **options)
    live = weights_after(teacher, batches, pair.tokenizer, objective=term)
    stored = weights_after(CachedTeacher(tmp_path), batches, pair.tokenizer, objective=term)
    assert all(torch.equal(a, b) for a, b in zip(live, stored, strict=True))


def test_bfloat16_is_within_rounding(written, tmp_path):
    pair, teacher, batches, _ = written
    write_cache(tmp_path, teacher, batches, pair.tokenizer, dtype=torch.bfloat16)
    cached = CachedTeacher(tmp_path)
    for batch in batches:
        pairs = teacher.read(batch, pair.tokenizer)
        rows = {4: pairs.teacher_rows_at(batch.response_mask.flatten().nonzero().squeeze(1))}
        live = teacher.capture(pairs, rows)[4]
        stored = cached.capture(pairs, rows)[4]
        assert torch.equal(stored, live.bfloat16())
    losses = [
        loss_of(Representation(), pair.student, asked, batches[0], pair.tokenizer)[0].item()
        for asked in (teacher, cached)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", ["all", "last"])
def test_bytes_per_position_are_predicted_within_two_percent(written, tmp_path, dtype, layers, capsys):
    pair, teacher, batches, _ = written
    size = write_cache(tmp_path, teacher, batches, pair.tokenizer, layers=layers, dtype=dtype)
    found = sum(path.stat().st_size for path in tmp_path.glob("states-*"))
    assert found == pytest.approx(size.bytes, rel=0.02)
    assert "bytes each to write" in capsys.readouterr().out


def test_no_weights_of_the_teacher_are_in_memory(written, tmp_path):
    pair, teacher, batches, _ = written
    write_cache(tmp_path, teacher, batches, pair.tokenizer)
    assert all(p.is_meta for p in CachedTeacher(tmp_path).model.parameters())


def test_it_goes_on_behind_the_last_whole_shard(written, tmp_path, monkeypatch):
    pair, teacher, batches, _ = written
    write_cache(tmp_path / "whole", teacher, batches, pair.tokenizer)
    asked = []
    capture = Teacher.capture

    def failing(self, *arguments):
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return capture(self, *arguments)

    monkeypatch.setattr(Teacher, "capture", failing)
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "cut", teacher, batches, pair.tokenizer, shard_bytes=1)
    assert len(read_index(tmp_path / "cut")["shards"]) == 2
    rest = write_cache(tmp_path / "cut", teacher, batches, pair.tokenizer, shard_bytes=1)
    assert len(asked) == 5 and rest.responses == 8, "the two batches that were stored are not read again"
    for name in ("whole", "cut"):
        cached = CachedTeacher(tmp_path / name)
        for batch in batches:
            pairs = cached.read(batch, pair.tokenizer)
            rows = {4: pairs.teacher_rows_at(batch.response_mask.flatten().nonzero().squeeze(1))}
            assert torch.equal(cached.capture(pairs, rows)[4], capture(teacher, pairs, rows)[4])


def test_a_kill_leaves_a_cache_that_goes_on(written, tmp_path):
    pair, teacher, batches, rollouts = written
    rollouts.save(tmp_path / "rollouts.safetensors")
    script = f"""
        import os, signal
        from oprd_nb.cached import CacheWriter, write_cache
        from oprd_nb.core import Rollouts
        from oprd_nb.models.pairs import embedded
        from oprd_nb.teachers import Teacher
        pair = embedded("same")
        finish = CacheWriter._finish
        def last(self, shard):
            finish(self, shard)
            if len(self.shards) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        CacheWriter._finish = last
        rollouts = Rollouts.load({str(tmp_path / "rollouts.safetensors")!r})
        teacher = Teacher(pair.teacher, pair.tokenizer)
        write_cache({str(tmp_path / "cut")!r}, teacher, rollouts, pair.tokenizer, batch_size=4, shard_bytes=1)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    rest = write_cache(tmp_path / "cut", teacher, rollouts, pair.tokenizer, batch_size=4, shard_bytes=1)
    assert rest.responses == 8
    live = weights_after(teacher, batches, pair.tokenizer, steps=4)
    stored = weights_after(CachedTeacher(tmp_path / "cut"), batches, pair.tokenizer, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(live, stored, strict=True))


def test_what_is_not_in_the_cache_is_refused_in_one_line(written, tmp_path):
    pair, teacher, batches, _ = written
    write_cache(tmp_path, teacher, batches, pair.tokenizer, layers=[2, 4], positions="last:5")
    cached = CachedTeacher(tmp_path)
    asked = (pair.student, cached)
    fine = Representation([2, 4], positions="last:5")
    new = HFSampler(pair.student, pair.tokenizer).sample(
        pair.task.test["prompt"][:2], max_new_tokens=8, seed=5
    )
    with pytest.raises(ValueError, match="is not among its 16 responses; train on the rollouts"):
        loss_of(fine, *asked, new, pair.tokenizer)
    with pytest.raises(ValueError, match=r"rep reads layers \[1, 3\]; the cache .* holds layers \[2, 4\]"):
        loss_of(Representation(positions="last:5"), *asked, batches[0], pair.tokenizer)
    with pytest.raises(ValueError, match="reads final_norm=False"):
        loss_of(Representation([4], positions="last:5", final_norm=False), *asked, batches[0], pair.tokenizer)
    with pytest.raises(ValueError, match="holds positions='last:5', predicting=False; a term reads others"):
        loss_of(Representation([2], positions="last:6"), *asked, batches[0], pair.tokenizer)
    with pytest.raises(ValueError, match="full compares distributions"):
        loss_of(FullKL(), *asked, batches[0], pair.tokenizer)
    cached.check_weights(weights_mark(pair.teacher))
    with pytest.raises(ValueError, match="written by another teacher"):
        cached.check_weights(weights_mark(pair.student))


def test_another_cache_is_not_written_into_a_folder_that_has_one(written, tmp_path):
    pair, teacher, batches, _ = written
    write_cache(tmp_path, teacher, batches, pair.tokenizer)
    with pytest.raises(ValueError, match=r"layers \[1, 2, 3, 4\], not \[4\]"):
        CacheWriter(tmp_path, teacher, pair.tokenizer, layers="last")
    with pytest.raises(ValueError, match="weights"):
        CacheWriter(tmp_path, Teacher(pair.student, pair.tokenizer), pair.tokenizer)
    with pytest.raises(ValueError, match="cannot be read as a cache"):
        CachedTeacher(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="only a single model that is asked the student's prompts"):
        write_cache(tmp_path, Teacher(pair.teacher, pair.tokenizer, prompt=list), batches, pair.tokenizer)


def test_a_teacher_with_another_tokenizer_can_be_stored(tmp_path):
    pair = embedded("cross_tokenizer")
    rollouts = HFSampler(pair.student, pair.tokenizer).sample(
        pair.task.train["prompt"][:8], max_new_tokens=24
    )
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer, min_coverage=0.1)
    write_cache(tmp_path, teacher, [rollouts], pair.tokenizer, positions="all")
    cached = CachedTeacher(tmp_path)
    cached.min_coverage = 0.1
    pairs = cached.read(rollouts, pair.tokenizer)
    kept = (rollouts.response_mask & pairs.paired).flatten().nonzero().squeeze(1)
    rows = {1: pairs.teacher_rows_at(kept)}
    assert torch.equal(cached.capture(pairs, rows)[1], teacher.capture(pairs, rows)[1])


def test_a_run_from_a_cache_is_a_run_with_the_teacher(written, tmp_path):
    pair, teacher, _, rollouts = written
    write_cache(tmp_path / "cache", teacher, rollouts, pair.tokenizer)
    students = []
    losses = []
    for name, asked in {"live": teacher, "cached": CachedTeacher(tmp_path / "cache")}.items():
        student = embedded("same").student
        trainer = OPRDTrainer(
            model=student,
            teacher=asked,
            objective=Representation(),
            args=short_run(
                tmp_path / name,
                max_steps=20,
                logging_steps=1,
                gradient_accumulation_steps=2,
                per_device_train_batch_size=4,
                logprob_tolerance=float("inf"),
                eval_strategy="steps",
                eval_steps=20,
            ),
            train_dataset=pair.task.train.select(range(16)),
            eval_dataset=pair.task.test.select(range(4)),
            processing_class=pair.tokenizer,
            sampler=ReplaySampler(rollouts, pair.tokenizer),
            eval_sampler=HFSampler(student, pair.tokenizer),
        )
        trainer.train()
        students.append(student)
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    # The batches of a run are laid out otherwise than those of the cache, so the states agree to rounding.
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][-1] < losses[0][0]
    for mine, theirs in zip(*(student.parameters() for student in students), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-3)
