"""Positions paired by bytes: against brute force, on embedded and byte-level tokenizers.

There tokens split characters, and some text cannot be trusted.
"""

import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from oprd_nb.core import Rollouts
from oprd_nb.models.pairs import embedded
from oprd_nb.pairing.layers import pair_layers
from oprd_nb.pairing.positions import (
    Pairs,
    _align,
    _check_coverage,
    _join_bytes,
    _without_prefix_space,
    end_of_turn,
    identity_pairs,
    pair_positions,
)
from oprd_nb.pairing.token_bytes import _byte_alphabet, _TokenBytes, fingerprint, vocabulary_bytes
from oprd_nb.rollouts.samplers import HFSampler

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CORPUS = "the sum of the roots is 12, so \\frac{3}{4} + 37 = 37.75 and ∑ über 数学 😀 naïve\n" * 20


def byte_level(vocab_size, text):
    """A GPT-2-like tokenizer trained on `text`: every byte is a token, so a token can be half a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=["<|user|>", "<|assistant|>"],
    )


@pytest.fixture(scope="module")
def tokenizers():
    return byte_level(270, CORPUS), byte_level(400, CORPUS)


def brute_force(rollouts, pairs, student_tokenizer, teacher_tokenizer):
    """For each response token: the teacher prefix with the longest prefix of the student's bytes.

    Found by trying all.
    """
    tables = [vocabulary_bytes(t) for t in (student_tokenizer, teacher_tokenizer)]
    expected = []
    for b in range(len(rollouts)):
        ours, theirs = rollouts.responses()[b], pairs.teacher_inputs.responses()[b]
        prompt_end = (
            int(
                (
                    pairs.teacher_inputs.attention_mask[b]
                    & (pairs.teacher_inputs.response_mask[b].cumsum(0) == 0)
                ).sum()
            )
            - 1
        )
        row = []
        for i in range(len(ours) + 1):
            if i and tables[0][ours[i - 1]] is None:
                row.append((prompt_end + len(theirs), 0) if i == len(ours) else None)
                continue
            read = b"".join(tables[0][t] for t in ours[:i])
            best = max(
                (
                    j
                    for j in range(len(theirs) + 1)
                    if None not in [tables[1][t] for t in theirs[:j]]
                    and read.startswith(b"".join(tables[1][t] for t in theirs[:j]))
                ),
                key=lambda j: j,
            )
            row.append((prompt_end + best, len(read) - len(b"".join(tables[1][t] for t in theirs[:best]))))
        expected += row
    return expected


def rollouts_of(texts, tokenizer, ended=True):
    prompts = [[{"role": "user", "content": "how many?"}] for _ in texts]
    ids = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True)["input_ids"]
        for p in prompts
    ]
    responses = [
        tokenizer(t, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * ended for t in texts
    ]
    return Rollouts.from_ids(ids, responses, tokenizer.pad_token_id, prompts)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="the sum 37=∑ü数😀\né́+{}\\frac", max_size=25), min_size=1, max_size=3))
def test_equals_brute_force(texts):
    pair = embedded_tokenizers()
    rollouts = rollouts_of(texts, pair[0])
    pairs = pair_positions(rollouts, *pair, min_coverage=0.0)
    found = list(
        zip(
            (pairs.teacher_rows % pairs.teacher_inputs.input_ids.shape[1]).tolist(),
            pairs.offset.tolist(),
            strict=True,
        )
    )
    assert found == brute_force(rollouts, pairs, *pair)
    assert (
        pairs.coverage == 1.0
        and (pairs.teacher_rows.diff() >= 0).all()
        and (pairs.student_rows.diff() > 0).all()
    )
    shared = pairs.offset == 0
    assert (pairs.teacher_rows[shared].diff() > 0).all()


_CACHE = []


def embedded_tokenizers():
    if not _CACHE:
        _CACHE.extend([byte_level(270, CORPUS), byte_level(400, CORPUS)])
    return _CACHE


def test_a_response_cut_inside_a_character(tokenizers):
    student, teacher = tokenizers
    rollouts = rollouts_of(["a 😀"], student, ended=False)
    cut = Rollouts.from_ids(rollouts.prompt_ids(), [rollouts.responses()[0][:-1]], 0, rollouts.prompts)
    pairs = pair_positions(cut, student, teacher, min_coverage=0.0)
    trusted = sum(len(vocabulary_bytes(student)[i]) for i in cut.responses()[0]) - 2
    # What comes before the broken character is paired, the rest is not.
    assert trusted > 0 and 0 < pairs.coverage < 1
    assert (pairs.offsets[~pairs.paired] == 0).all()


def test_special_tokens_inside_a_response_end_what_can_be_trusted(tokenizers):
    student, teacher = tokenizers
    user = student.convert_tokens_to_ids("<|user|>")
    ids = student("the sum", add_special_tokens=False)["input_ids"]
    prompts = [[{"role": "user", "content": "?"}]]
    rollouts = Rollouts.from_ids([[5]], [[*ids, user, *ids, student.eos_token_id]], 0, prompts)
    with pytest.warns(UserWarning, match="are paired"):
        pairs = pair_positions(rollouts, student, teacher, min_coverage=0.1)
    assert pairs.coverage == pytest.approx(len(ids) / (2 * len(ids) + 2))
    with pytest.raises(ValueError, match="min_coverage=0.9"):
        pair_positions(rollouts, student, teacher, min_coverage=0.9)


def test_end_of_turn_pairs_with_end_of_turn(tokenizers):
    student, teacher = tokenizers
    for ended in (True, False):
        rollouts = rollouts_of(["the sum is 37"], student, ended)
        pairs = pair_positions(rollouts, student, teacher)
        last = pairs.teacher_inputs.input_ids.flatten()[pairs.teacher_rows[-1]]
        assert (last == teacher.eos_token_id) == ended and pairs.coverage == 1.0


def test_an_empty_response_has_no_pairs_of_its_own(tokenizers):
    rollouts = rollouts_of(["37", "37"], tokenizers[0])
    rollouts.response_mask[0] = False
    pairs = pair_positions(rollouts, *tokenizers)
    assert not (pairs.paired & pairs.response_mask)[0].any()
    assert pairs.coverage == 1.0


def test_coverage_warns_below_95_percent_and_not_at_it():
    rollouts = Rollouts.from_ids([[3]], [[4] * 20], 0)
    positions = torch.arange(21)[None].clone()
    positions[0, -1] = -1
    pairs = Pairs(rollouts, positions, torch.zeros_like(positions), rollouts.response_mask)
    assert pairs.coverage == 0.95
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _check_coverage(pairs, 0.0)
        _check_coverage(pairs, 0.95)
    positions[0, -2] = -1
    with pytest.warns(UserWarning, match="only 90.0%"):
        _check_coverage(pairs, 0.9)
    with pytest.raises(ValueError, match="min_coverage=0.91"):
        _check_coverage(pairs, 0.91)


def test_the_end_of_a_turn_is_what_the_template_writes():
    tokenizer = byte_level(270, CORPUS)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    tokenizer.eos_token = "<|pad|>"
    assert end_of_turn(tokenizer) == end != tokenizer.eos_token_id
    bare = byte_level(270, CORPUS)
    bare.chat_template = None
    assert end_of_turn(bare) == bare.eos_token_id


def test_a_teacher_that_opens_every_text_reads_the_response_without_its_opening(tokenizers):
    student, teacher = tokenizers
    opening = byte_level(400, CORPUS)
    opening.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", opening.convert_tokens_to_ids("<|user|>"))]
    )
    assert len(opening("37")["input_ids"]) == len(teacher("37")["input_ids"]) + 1
    rollouts = rollouts_of(["the sum is 37"], student)
    plain, opened = (pair_positions(rollouts, student, other) for other in (teacher, opening))
    assert plain.teacher_inputs.responses() == opened.teacher_inputs.responses()


def test_the_first_position_of_a_sequence_can_be_a_partner():
    rollouts = Rollouts.from_ids([[3]], [[4, 5]], 0)
    positions = torch.tensor([[0, 1, -1]])
    pairs = Pairs(rollouts, positions, torch.zeros_like(positions), rollouts.response_mask)
    assert pairs.paired.tolist() == [[True, True, False]]
    assert pairs.student_rows.tolist() == [0, 1]


def test_bytes_are_joined_up_to_the_first_special_token():
    """Tokens: a, one of no bytes, a special one; ids beyond the vocabulary are special."""
    table = _TokenBytes([b"a", b"", None], np.array([1, 0, -1, -1]), True)
    for special in (2, 7):
        data, lengths = _join_bytes(np.array([0, 1, 0, special, 0]), table)
        assert data == b"aa" and lengths.tolist() == [1, 0, 1]
    assert _join_bytes(np.array([1, 0]), table)[1].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("data", "text", "left", "lengths"),
    [
        (b" ab", b"ab", b"ab", [0, 1, 1]),
        (b" ab", b" ab", b" ab", [1, 1, 1]),
        (b"  b", b"b", b"  b", [1, 1, 1]),
        (b"  b", b" b", b" b", [0, 1, 1]),
    ],
)
def test_one_space_at_the_front_is_left_out(data, text, left, lengths):
    found, found_lengths = _without_prefix_space(data, np.array([1, 1, 1]), text)
    assert found == left and found_lengths.tolist() == lengths


def test_same_tokenizer_is_the_identity(tokenizers):
    student, _ = tokenizers
    rollouts = rollouts_of(["the sum", "37"], student)
    pairs = pair_positions(rollouts, student, student)
    assert (
        torch.equal(pairs.student_rows, pairs.teacher_rows)
        and pairs.teacher_inputs is rollouts
        and pairs.boundary_coverage == 1.0
    )
    assert torch.equal(identity_pairs(rollouts).teacher_positions, pairs.teacher_positions)


def test_fingerprints_see_merges_and_not_sizes(tokenizers):
    corpus = "".join(random.Random(0).choices("abcdefg ", k=2000))
    assert fingerprint(tokenizers[0]) == fingerprint(tokenizers[0]) != fingerprint(byte_level(270, corpus))
    assert len(tokenizers[0]) == 270


def test_prompts_are_needed_across_tokenizers(tokenizers):
    rollouts = Rollouts.from_ids([[5]], [[6]], 0)
    with pytest.raises(ValueError, match="rollouts.prompts is None"):
        pair_positions(rollouts, *tokenizers)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=8), st.lists(st.integers(1, 4), min_size=1, max_size=8)
)
def test_align_is_the_last_boundary_at_or_before(ours, theirs):
    import numpy as np

    student, teacher = np.cumsum(ours), np.cumsum(theirs)
    index, offset = _align(student, teacher, aligned_prefix=int(student[-1]))
    for end, i, o in zip(student, index, offset, strict=True):
        boundaries = [0, *teacher]
        assert boundaries[i] + o == end and (i == len(teacher) or boundaries[i + 1] > end)


@given(st.integers(1, 40), st.integers(1, 60))
def test_layer_map_is_monotone_and_meets_at_both_ends(student, teacher):
    pairs = pair_layers(student, teacher)
    assert [l for l, _ in pairs] == list(range(1, student + 1)) and pairs[-1][1] == teacher
    assert all(a <= b for (_, a), (_, b) in zip(pairs, pairs[1:], strict=False)) and (
        student == 1 or pairs[0][1] == 1
    )
    for l, t in pairs[:-1]:
        # |(l - 1) / (student - 1) * (teacher - 1) + 1 - t| <= 1/2, in whole numbers
        assert 2 * abs((l - 1) * (teacher - 1) - (t - 1) * (student - 1)) <= student - 1


def test_embedded_coverage_is_reported_by_offset():
    pair = embedded("cross_tokenizer")
    texts = ["37+58=95\n95+94=189\n\\boxed{189}"]
    rollouts = rollouts_of(texts, pair.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = pair_positions(rollouts, pair.tokenizer, pair.teacher_tokenizer)
    shares = pairs.coverage_by_offset()
    assert (
        set(shares) == {0, 1}
        and sum(shares.values()) == pytest.approx(1.0)
        and shares[1] == pytest.approx(4 / len(rollouts.responses()[0]))
    )


@pytest.mark.parametrize(
    "depths, teacher_layers",
    [((3, 4), [1, 3, 4]), ((3, 6), [1, 4, 6]), ((5, 3), [1, 2, 2, 3, 3]), ((5, 7), [1, 3, 4, 6, 7])],
)
def test_halves_round_up_in_eq_11(depths, teacher_layers):
    assert [teacher for _, teacher in pair_layers(*depths)] == teacher_layers


def test_coverage_counts_pairs_boundaries_and_offsets():
    """Six response tokens: at a shared boundary 2, one byte past one 1, two bytes past 2, unpaired 1."""
    rollouts = Rollouts.from_ids([[3, 4]], [[5, 6, 7, 8, 9, 2]], 0)
    positions = torch.tensor([[-1, 1, 2, 2, 3, 3, -1, 4]])
    offsets = torch.tensor([[0, 0, 0, 1, 2, 2, 0, 0]])
    pairs = Pairs(rollouts, positions, offsets, rollouts.response_mask)
    assert pairs.coverage == pytest.approx(5 / 6)
    assert pairs.boundary_coverage == pytest.approx(2 / 6)
    assert pairs.coverage_by_offset() == pytest.approx({0: 2 / 6, 1: 1 / 6, 2: 2 / 6})


def test_a_byte_fallback_student_cut_inside_a_character_keeps_those_before():
    """Its decoder turns a run of bytes with an unfinished character into no character at all."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from oprd_nb.pairing.positions import _response_of

    vocabulary = {"<unk>": 0, "a": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    rules = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    rules.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>")
    ids = np.array(tokenizer.encode("a漢字漢字漢", add_special_tokens=False)[:-1])
    assert len(ids) == 1 + 5 * 3 - 1
    assert _response_of(ids, tokenizer).text == "a漢字漢字"


def test_a_prompt_that_comes_again_is_encoded_as_itself():
    pair = embedded("cross_tokenizer")
    first, second = pair.task.train["prompt"][:2]
    prompts = [first, second, first]
    rollouts = HFSampler(pair.student, pair.tokenizer).sample(prompts, temperature=0, max_new_tokens=12)
    read = pair_positions(rollouts, pair.tokenizer, pair.teacher_tokenizer, 0.0).teacher_inputs
    ids = [row[mask.bool()].tolist() for row, mask in zip(read.input_ids, read.attention_mask, strict=True)]
    assert ids[0] == ids[2] != ids[1]


def test_the_similarity_pairing_is_the_best_of_all_in_order():
    """Against every non-decreasing assignment of three student layers to four teacher layers."""
    similarity = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.8, 0.2, 0.5, 0.1], [0.7, 0.1, 0.2, 0.6]])
    found = pair_layers(3, 4, how="similarity", similarity=similarity)
    every = itertools.combinations_with_replacement(range(4), 3)
    best = max(every, key=lambda chosen: sum(float(similarity[l, t]) for l, t in enumerate(chosen)))
    assert found == [(l + 1, t + 1) for l, t in enumerate(best)]


def test_the_byte_alphabet_is_gpt2s():
    assert _byte_alphabet() == {character: byte for byte, character in bytes_to_unicode().items()}


def test_fingerprints_see_the_scores_of_a_unigram_model():
    def unigram(score):
        pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", score)]
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)), unk_token="<unk>"
        )

    likely, unlikely = unigram(-0.5), unigram(-5.0)
    assert likely("ab")["input_ids"] != unlikely("ab")["input_ids"]
    assert fingerprint(likely) == fingerprint(unigram(-0.5)) != fingerprint(unlikely)
