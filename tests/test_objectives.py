"""Each loss against a float64 reference, its gradient against finite differences.

The sampled-token estimator against a chi-squared test.
"""

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import tiny_qwen3
from scipy import stats
from transformers import GPT2Config, GPT2LMHeadModel

from oprd_nb.capture import FINAL, backbone_of, blocks_of, capture_each, lm_head_of
from oprd_nb.core import Rollouts
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.distances import DISTANCES, Target, position_distances
from oprd_nb.objectives.objective import loss_of, loss_on_pairs
from oprd_nb.objectives.output_space import CrossEntropy, FullKL, SampledTokenKL, TopKKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.objectives.terms import Objective, SupervisedSteps, Term, TermInputs, as_objective
from oprd_nb.pairing.positions import identity_pairs
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.teachers import Teacher

TERMS = [
    Representation(layers="all", positions="last:3", distance="mse"),
    Representation(layers="even", positions="first:2"),
    Representation(layers="1", positions="all", distance="normalized_mse_paper"),
    Representation(layers="last", distance="cosine", predicting=True),
    Representation(distance="normalized_mse", final_norm=False),
    SampledTokenKL(),
    SampledTokenKL(control_variate=True),
    TopKKL(3),
    TopKKL(3, renormalize=False),
    TopKKL(1),
    TopKKL(500),
    FullKL(),
    FullKL("forward"),
    FullKL("jsd"),
    FullKL("jsd", beta=0.2, positions="last:2"),
    CrossEntropy(),
    CrossEntropy(positions="last:2"),
]
RESPONSES = [
    [10, 11, 12, 2],
    [13, 14, 15, 16, 17, 2],
    [18],
    [19, 20, 21],
]  # a one-token response, and two that never end
PROMPTS = [[3, 4, 5, 6], [7], [8, 9], [3, 9]]


def tiny_gpt2(seed, layers=3, width=32, vocab_size=40):
    """GPT-2 and not Qwen3: its LayerNorm stays in float64.

    RMSNorm computes in float32 and blurs finite differences.
    """
    torch.manual_seed(seed)
    return (
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_embd=width,
                n_layer=layers,
                n_head=4,
                n_positions=64,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
                tie_word_embeddings=False,
                initializer_range=0.2,
            )
        )
        .double()
        .eval()
    )


@pytest.fixture(scope="module")
def models():
    return tiny_gpt2(0), tiny_gpt2(1).requires_grad_(False)


@pytest.fixture(scope="module")
def small_models():
    """Fewer and smaller layers, for tests that take a thousand gradients."""
    return tiny_gpt2(0, 1, 16, 20), tiny_gpt2(1, 1, 16, 20).requires_grad_(False)


@pytest.fixture
def rollouts():
    return Rollouts.from_ids(PROMPTS, RESPONSES, pad_token_id=2)  # the pad is the end of the turn


class BareTeacher(Teacher):
    """A teacher that is given tokens and never text: it needs no tokenizer."""

    def __post_init__(self):
        pass


def loss(objective, student, teacher, rollouts, counts=None):
    """The real path from rollouts to a number, with two models that share a tokenizer."""
    objective = as_objective(objective)
    pairs = identity_pairs(rollouts)
    counts = objective.counts(pairs) if counts is None else counts
    return loss_on_pairs(objective, student, BareTeacher(teacher, None), rollouts, pairs, counts)[0]


def chosen(term, n):
    """Response indices 0..n-1 that the term's positions mean, written out."""
    side, _, k = term.positions.partition(":")
    k = n if side == "all" else int(k or 1)
    return list(range(min(k, n))) if side == "first" else list(range(max(0, n - k), n))


def reference_row(term, student_out, teacher_out, t, token):
    """One row of one term from plain transformers outputs, written from the formulas.

    `t` is the column of the token.
    """
    if isinstance(term, Representation):
        at = t - 1 if term.predicting else t
        ids = {"all": [1, 2, 3], "even": [2], "1": [1], "last": [3]}[term.layers]
        total = 0
        for layer in ids:
            a, b = (_layer(out, layer, term.final_norm)[at] for out in (student_out, teacher_out))
            unit = [x / math.sqrt(float((x * x).sum())) for x in (a, b)]
            cos = float((unit[0] * unit[1]).sum())
            total += {
                "mse": float(((a - b) ** 2).sum()) / len(a),
                "normalized_mse": 2 * (1 - cos),
                "normalized_mse_paper": 2 * (1 - cos) / len(a),
                "cosine": 1 - cos,
            }[term.distance]
        return total / len(ids)
    p, q = (
        torch.exp(out.logits[0, t - 1] - torch.logsumexp(out.logits[0, t - 1], 0))
        for out in (student_out, teacher_out)
    )
    if isinstance(term, CrossEntropy):
        return -float(torch.log(p[token]))
    if isinstance(term, SampledTokenKL):
        return float(torch.log(p[token]) - torch.log(q[token]))
    if isinstance(term, TopKKL):
        top = torch.argsort(p, descending=True)[: term.k]
        p, q = p[top], q[top]
        if term.renormalize:
            p, q = p / p.sum(), q / q.sum()
        return float((p * (p.log() - q.log())).sum())
    if term.divergence == "jsd":
        m = term.beta * q + (1 - term.beta) * p
        return float(term.beta * (q * (q / m).log()).sum() + (1 - term.beta) * (p * (p / m).log()).sum())
    a, b = (p, q) if term.divergence == "reverse" else (q, p)
    return float((a * (a.log() - b.log())).sum())


def _layer(out, layer, final_norm):
    return out.raw[layer] if not final_norm else out.hidden_states[layer][0]


def outputs(model, ids):
    """Transformers' own outputs, and each block's raw output (before the final norm)."""
    raw = {}
    handles = [
        b.register_forward_hook(
            lambda m, a, o, i=i: raw.__setitem__(i, (o[0] if isinstance(o, tuple) else o)[0])
        )
        for i, b in enumerate(blocks_of(backbone_of(model))[1], 1)
    ]
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    out.raw = raw
    return out


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_equals_a_reference_written_from_the_formula(term, reduction, models, rollouts):
    """Sequence by sequence, without padding, masks, hooks or chunks."""
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        outs = [outputs(model, prompt + response) for model in models]
        rows.append(
            [reference_row(term, *outs, len(prompt) + i, response[i]) for i in chosen(term, len(response))]
        )
    flat = [value for row in rows for value in row]
    expected = (
        sum(flat) / len(flat)
        if reduction == "token"
        else sum(sum(row) / len(row) for row in rows) / len(rows)
    )
    value = loss(as_objective(term).with_reduction(reduction), *models, rollouts).item()
    assert value == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("term", [t for t in TERMS if not isinstance(t, SampledTokenKL)], ids=repr)
def test_gradient_by_finite_differences(term, models, rollouts):
    student, teacher = models
    weight = student.transformer.h[0].mlp.c_proj.weight
    value = loss(term, student, teacher, rollouts)
    gradient = torch.autograd.grad(value, weight)[0]
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eps, sides = 1e-5, []
    with torch.no_grad():
        for sign in (1, -1):
            weight.add_(direction, alpha=sign * eps)
            sides.append(loss(term, student, teacher, rollouts).item())
            weight.sub_(direction, alpha=sign * eps)
    numeric = (sides[0] - sides[1]) / (2 * eps)
    assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)


def projected_gradients(term, models, rollouts, draws, projections=50):
    """Gradients of the term, prefixes fixed and tokens redrawn at temperature 1, on random directions.

    Also the exact KL gradient's.
    """
    student, teacher = models
    mask = term.mask(identity_pairs(rollouts))
    states = [
        capture_each(m, rollouts.input_ids, rollouts.attention_mask, {FINAL: mask})[FINAL] for m in models
    ]
    heads = (lm_head_of(student), lm_head_of(teacher))
    p = heads[0](states[0]).softmax(-1).detach()
    parameters = [x for x in student.parameters() if x.requires_grad]
    directions = torch.randn(
        projections,
        sum(x.numel() for x in parameters),
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(1),
    )

    def gradient(value):
        grads = torch.autograd.grad(value, parameters, retain_graph=True)
        return directions @ torch.cat([g.flatten() for g in grads])

    def rows(tokens):
        return TermInputs([(FINAL, FINAL)], [states[0]], [Target.of(states[1].detach())], tokens, *heads)

    generator = torch.Generator().manual_seed(2)
    exact = gradient(FullKL().per_position(rows(p.argmax(-1)))[0].sum())
    samples = [
        gradient(term.per_position(rows(torch.multinomial(p, 1, generator=generator)[:, 0]))[0].sum())
        for _ in range(draws)
    ]
    return torch.stack(samples).numpy(), exact.numpy()


def p_value(samples, expected):
    """Hotelling's T-squared of the mean against `expected`.

    Its large-sample law is chi-squared with one degree of freedom per projection.
    """
    n, k = samples.shape
    off = samples.mean(0) - expected
    t2 = n * off @ np.linalg.solve(np.cov(samples.T), off)
    return stats.f.sf(t2 * (n - k) / (k * (n - 1)), k, n - k)


def long_rollouts():
    """4 responses x 20 tokens, so that the noise spans more than the 50 directions."""
    generator = torch.Generator().manual_seed(3)
    return Rollouts.from_ids(
        PROMPTS, torch.randint(3, 20, (4, 20), generator=generator).tolist(), pad_token_id=2
    )


@pytest.mark.parametrize("control_variate", [False, True])
def test_sampled_token_gradient_is_the_kl_gradient_on_average(control_variate, small_models):
    samples, exact = projected_gradients(
        SampledTokenKL(control_variate=control_variate), small_models, long_rollouts(), draws=1000
    )
    assert p_value(samples, exact) > 0.001


def test_back_propagating_the_log_ratio_would_be_caught(small_models):
    """The classic bug: the same statistic must reject the gradient of the log-ratio itself.

    The expectation of that gradient is zero.
    """

    class Bug(SampledTokenKL):
        def of_logits(self, student_logits, teacher_logits, tokens):
            chosen = [
                x.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
                for x in (student_logits, teacher_logits)
            ]
            return chosen[0] - chosen[1]

    samples, exact = projected_gradients(Bug(), small_models, long_rollouts(), draws=500)
    assert p_value(samples, exact) < 1e-6
    assert p_value(samples, 0 * exact) > 0.001


def test_control_variate_lowers_the_variance(small_models):
    plain, _ = projected_gradients(SampledTokenKL(), small_models, long_rollouts(), draws=200)
    steadier, _ = projected_gradients(
        SampledTokenKL(control_variate=True), small_models, long_rollouts(), draws=200
    )
    assert steadier.var(0).mean() < plain.var(0).mean()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_pads_change_nothing(term, side, models, rollouts):
    """Each response alone and unpadded, with the step's divisors, adds up to the padded batch.

    The pad token is the end of the turn throughout.
    """
    student, teacher = models
    padded = Rollouts.from_ids(PROMPTS, RESPONSES, pad_token_id=2, side=side)
    counts = as_objective(term).counts(identity_pairs(padded))
    together = loss(term, student, teacher, padded)
    alone = sum(
        loss(term, student, teacher, Rollouts.from_ids([p], [r], 2), counts)
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    )
    assert torch.isfinite(together) and together.item() == pytest.approx(alone.item(), rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_micro_batches_add_up(term, reduction, models, rollouts):
    student, teacher = models
    objective = as_objective(term).with_reduction(reduction)
    counts = objective.counts(identity_pairs(rollouts))
    weights = [p for p in student.parameters()]
    whole = torch.autograd.grad(loss(objective, student, teacher, rollouts), weights, allow_unused=True)
    parts = [
        torch.autograd.grad(
            loss(
                objective,
                student,
                teacher,
                Rollouts.from_ids(PROMPTS[i : i + 2], RESPONSES[i : i + 2], 2),
                counts,
            ),
            weights,
            allow_unused=True,
        )
        for i in (0, 2)
    ]
    for w, a, b in zip(whole, *parts, strict=True):
        if w is not None:
            torch.testing.assert_close(w, a + b, rtol=1e-6, atol=1e-10)


def test_micro_batches_of_another_tokenizer_add_up():
    pair = embedded("cross_tokenizer")
    rollouts = HFSampler(pair.student, pair.tokenizer).sample(
        pair.task.train["prompt"][:8], max_new_tokens=40
    )
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer)
    objective = as_objective(Representation(positions="last:9"))
    counts = objective.counts(teacher.read(rollouts, pair.tokenizer))

    def gradient(which):
        part = Rollouts.from_ids(
            [rollouts.prompt_ids()[i] for i in which],
            [rollouts.responses()[i] for i in which],
            0,
            [rollouts.prompts[i] for i in which],
        )
        value = loss_of(objective, pair.student.requires_grad_(True), teacher, part, pair.tokenizer, counts)[
            0
        ]
        return torch.autograd.grad(value, pair.student.model.layers[0].mlp.down_proj.weight)[0]

    whole = gradient(range(8))
    assert torch.allclose(whole, gradient([0, 1, 2]) + gradient([3, 4, 5, 6, 7]), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="different tokenizers"):
        loss_of(FullKL(), pair.student, teacher, rollouts, pair.tokenizer)


def test_a_micro_batch_without_rows_is_a_zero_with_a_gradient(models, rollouts):
    student, teacher = models
    empty = Rollouts(rollouts.input_ids, rollouts.attention_mask, torch.zeros_like(rollouts.response_mask))
    for term in TERMS:
        value = loss(term, student, teacher, empty)
        value.backward()
        assert value.item() == 0 and all(
            torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None
        )


def test_several_terms_share_one_pass(models, rollouts):
    student, teacher = models
    calls = []
    handle = backbone_of(student).register_forward_hook(lambda *_: calls.append(1))
    parts = [
        SampledTokenKL(),
        FullKL("forward", positions="last:2"),
        Representation(layers="2", positions="first:1"),
        Representation(layers="all"),
    ]
    total = loss(parts[0] + 2 * parts[1] + 10 * parts[2] + 0.5 * parts[3], student, teacher, rollouts)
    handle.remove()
    alone = [loss(part, student, teacher, rollouts).item() for part in parts]
    assert len(calls) == 1
    assert total.item() == pytest.approx(alone[0] + 2 * alone[1] + 10 * alone[2] + 0.5 * alone[3], rel=1e-9)


def test_vocabularies_padded_to_other_widths(models, rollouts):
    """A teacher with 24 spare rows in embedding and head says the same; tokens are compared, not widths."""
    student, teacher = models
    wide = tiny_gpt2(1, vocab_size=64).requires_grad_(False)
    wide.load_state_dict(
        {
            k: torch.cat([v, torch.zeros(24, *v.shape[1:], dtype=v.dtype)])
            if k in ("transformer.wte.weight", "lm_head.weight")
            else v
            for k, v in teacher.state_dict().items()
        }
    )
    for term in (FullKL(), TopKKL(3), SampledTokenKL()):
        assert loss(term, student, wide, rollouts).item() == pytest.approx(
            loss(term, student, teacher, rollouts).item(), rel=1e-9
        )


def test_masked_logits_keep_losses_and_gradients_finite(models, rollouts):
    """A token with logit -inf on one side: 0 * inf must not appear, forward or backward."""
    student, teacher = models
    mask = torch.zeros(40, dtype=torch.float64)
    mask[[5, 9]] = float("-inf")
    states = [torch.randn(6, 32, dtype=torch.float64, requires_grad=i == 0) for i in (0, 1)]
    for term in (
        FullKL(),
        FullKL("forward"),
        FullKL("jsd"),
        TopKKL(39),
        TopKKL(39, renormalize=False),
        SampledTokenKL(),
        SampledTokenKL(control_variate=True),
    ):
        for masked in (0, 1):
            heads = [lm_head_of(m) for m in models]
            plain = heads[masked]
            heads[masked] = lambda h, plain=plain: plain(h) + mask
            value = term.per_position(
                TermInputs([(FINAL, FINAL)], [states[0]], [Target.of(states[1])], torch.full((6,), 7), *heads)
            )[0].sum()
            gradient = torch.autograd.grad(value, states[0])[0]
            assert torch.isfinite(value) and torch.isfinite(gradient).all(), (term, masked)


def test_top_k_without_renormalisation_pulls_even_where_the_models_agree(models):
    """sum over top k of p (log p - log q) is no divergence.

    At p = q its gradient is that of the top-k mass, and 0 only for k = V.
    """
    student, _ = models
    hidden = torch.randn(5, 32, dtype=torch.float64)
    head = lm_head_of(student)
    for k in (3, 40):
        rows = TermInputs(
            [(FINAL, FINAL)],
            [hidden],
            [Target.of(hidden)],
            torch.zeros(5, dtype=torch.long),
            head,
            lambda h: head(h).detach(),
        )
        pull = torch.autograd.grad(
            TopKKL(k, renormalize=False).per_position(rows)[0].sum(), student.lm_head.weight
        )[0]
        mass = torch.autograd.grad(head(hidden).softmax(-1).topk(k).values.sum(), student.lm_head.weight)[0]
        torch.testing.assert_close(pull, mass)
        assert (pull.abs().max() > 1e-3) == (k == 3)


def test_tied_embeddings(rollouts):
    tied, teacher = tiny_qwen3(0, tie=True), tiny_qwen3(1)
    value = loss(Representation() + FullKL(), tied, teacher, rollouts)
    value.backward()
    assert torch.isfinite(tied.model.embed_tokens.weight.grad).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Representation(distance="l2"), "distance='l2': use one of"),
        (lambda: Representation(positions="end"), "positions='end'"),
        (lambda: TopKKL(0), "k=0"),
        (lambda: FullKL("sideways"), "divergence='sideways'"),
        (lambda: FullKL("jsd", beta=1.0), "beta=1.0"),
        (lambda: Objective([(1.0, FullKL())], reduction="mean"), "reduction='mean'"),
        (lambda: as_objective("oprd"), "objective='oprd'"),
        (lambda: FullKL() + as_objective(FullKL()).with_reduction("sequence"), "reduction: cannot add"),
        (lambda: Representation(final_norm=False) + Representation(), "final_norm"),
    ],
)
def test_bad_settings_name_argument_value_and_way_out(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_unequal_widths_ask_for_a_bridge():
    pair = embedded("cross_architecture")
    rollouts = HFSampler(pair.student, pair.tokenizer).sample(
        pair.task.train["prompt"][:2], max_new_tokens=10
    )
    with pytest.raises(ValueError, match="fit a bridge"):
        loss_of(
            Representation(), pair.student, Teacher(pair.teacher, pair.tokenizer), rollouts, pair.tokenizer
        )


class Sized(Term):
    """A term of one's own that says what it must and nothing else."""

    def per_position(self, inputs):
        return inputs.student[0].square().sum(-1), {}


def test_a_term_needs_per_position_alone(models, rollouts):
    student, teacher = models
    value = loss(Sized(), student, teacher, rollouts)
    lengths = [len(response) for response in RESPONSES]
    with torch.no_grad():
        final = capture_each(
            student, rollouts.input_ids, rollouts.attention_mask, {FINAL: rollouts.response_mask}
        )[FINAL]
    assert value.item() == pytest.approx((final.square().sum() / sum(lengths)).item())
    with pytest.raises(TypeError, match="per_position"):
        type("Nothing", (Term,), {})()


def test_a_term_whose_methods_contradict_each_other_is_refused():
    class Confused(Sized):
        def student_layers(self, num_student_layers):
            return [1, 2]

    Sized().check_layers(4, 6)
    message = r"Confused: student_layers says \[1, 2\], compared_layers \['final'\]"
    with pytest.raises(ValueError, match=message):
        Confused().check_layers(4, 6)


def test_the_layers_read_are_those_compared():
    class First(Sized):
        def compared_layers(self, num_student_layers, num_teacher_layers):
            return [(1, num_teacher_layers), (2, num_teacher_layers)]

    assert First().student_layers(4) == [1, 2]
    First().check_layers(4, 6)


@pytest.mark.parametrize(
    "result, message",
    [
        (torch.ones(3), "returned a Tensor"),
        ((torch.ones(()), {}), r"losses are \(\); return one number per position, \(14,\)"),
        ((torch.ones(14), {"own/size": torch.ones(2)}), r"own/size are \(2,\)"),
        ((torch.ones(14), {"own/size": 1.0}), "own/size are float"),
    ],
)
def test_losses_of_another_shape_are_refused(result, message, models, rollouts):
    class Wrong(Sized):
        def per_position(self, inputs):
            return result

    with pytest.raises(ValueError, match=f"Wrong.per_position: {message}"):
        loss(Wrong(), *models, rollouts)


def test_ten_empty_steps_in_a_row_end_a_run():
    steps = SupervisedSteps(FullKL() + Representation(positions="last:2"))
    empty = torch.zeros(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps.see(torch.tensor([1.0, 1.0]))
    with pytest.warns(UserWarning, match="for rep .positions='last:2'.: loss"):
        steps.see(torch.tensor([3.0, 0.0]))
    for _ in range(9):
        with pytest.warns(UserWarning, match="for full .*, rep "):
            steps.see(empty)
    # A step with positions begins the count anew.
    steps.see(torch.tensor([3.0, 1.0]))
    for _ in range(9):
        with pytest.warns(UserWarning):
            steps.see(empty)
    with pytest.raises(ValueError, match="10 steps in a row"):
        steps.see(empty)


def test_a_run_may_begin_with_nine_empty_steps():
    steps = SupervisedSteps(as_objective(FullKL()))
    for _ in range(9):
        with pytest.warns(UserWarning):
            steps.see(torch.zeros(1))
    with pytest.raises(ValueError, match="10 steps in a row"):
        steps.see(torch.zeros(1))


@pytest.mark.parametrize("distance", ["mse", "normalized_mse", "normalized_mse_paper", "cosine"])
def test_half_precision_is_raised_before_it_is_compared(distance):
    """The distance of the rounded states, not a rounded distance; the gradient is rounded once."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 512, generator=generator).bfloat16()
    teacher = (student.float() + 0.02 * torch.randn(5, 512, generator=generator)).bfloat16()
    exact = student.double().requires_grad_()
    expected = DISTANCES[distance](exact, teacher.double())
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    hidden = student.clone().requires_grad_()
    trained, cosine = position_distances(hidden, Target.of(teacher.clone()), distance)
    (gradient,) = torch.autograd.grad(trained.sum(), hidden)
    with torch.no_grad():
        read, same_cosine = position_distances(student, Target.of(teacher), distance)
    assert trained.dtype == read.dtype == cosine.dtype == torch.float32
    for values in (trained, read):
        torch.testing.assert_close(values.double(), expected.detach(), rtol=1e-3, atol=1e-7)
    assert torch.equal(cosine, same_cosine) and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), slope, rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("beta", [0, 1, -0.1, 1.1])
def test_the_weight_of_jsd_lies_between_its_limits(beta):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        FullKL("jsd", beta)


def test_loss_of_says_what_its_terms_measured():
    pair = embedded("same")
    rollouts = HFSampler(pair.student, pair.tokenizer).sample(
        pair.task.train["prompt"][:2], max_new_tokens=10
    )
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer)
    _, metrics = loss_of(Representation(), pair.student, teacher, rollouts, pair.tokenizer)
    cosines = {name: value for name, value in metrics.items() if "cosine" in name}
    assert cosines and all(0 < value < 1 for value in cosines.values())
    _, nothing = loss_of(Sized(), pair.student, teacher, rollouts, pair.tokenizer)
    assert not any("cosine" in name for name in nothing)


def test_defaults_of_terms():
    assert not Sized().predicting
    assert "layer_pairs" not in repr(Representation())
