"""A teacher behind a server: equal to the local one, and every server that is not it is refused in a line."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from short_runs import short_run

from oprd_nb.models import embedded
from oprd_nb.objectives.followups import TopKTailKL, Weighted
from oprd_nb.objectives.objective import loss_of
from oprd_nb.objectives.output_space import FullKL, SampledTokenKL, TopKKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.served import ServedTeacher, spread, vllm_answer
from oprd_nb.teachers import Teacher
from oprd_nb.training.trainer import OPRDTrainer

PAIR = embedded("same")
K = 8
LIST = {"data": [{"id": "teacher", "max_model_len": 256}]}


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM does; subclasses change the answer."""

    model = PAIR.teacher
    asked: list[dict] = []

    def do_GET(self):
        self.send(json.dumps(LIST))

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(request)
        self.send(self.text(request))

    def text(self, request) -> str:
        return json.dumps(self.changed(vllm_answer(self.model, request)))

    def changed(self, answer):
        return answer

    def send(self, text: str, status: int = 200):
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def serve():
    servers = []

    def start(handler=Handler, **changes):
        kind = type("Changed", (handler,), changes)
        server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def rollouts():
    return HFSampler(PAIR.student, PAIR.tokenizer).sample(PAIR.task.test["prompt"][:5], max_new_tokens=24)


LOCAL = Teacher(PAIR.teacher, PAIR.tokenizer)


def losses(term, rollouts, *teachers):
    return [loss_of(term, PAIR.student, teacher, rollouts, PAIR.tokenizer)[0] for teacher in teachers]


@pytest.mark.parametrize(
    "term",
    [
        TopKTailKL(4),
        TopKTailKL(K, divergence="forward"),
        SampledTokenKL(),
        Weighted(TopKTailKL(4), "student_doubt", 0.1),
    ],
    ids=["tail", "tail forward", "sampled", "weighted"],
)
def test_equal_to_the_local_teacher(term, rollouts, serve):
    """Loss and gradient, within the rounding of float32."""
    served = ServedTeacher(serve(), PAIR.tokenizer, k=K, weights=PAIR.teacher, batch_size=2)
    pairs = losses(term, rollouts, LOCAL, served)
    assert pairs[0].item() == pytest.approx(pairs[1].item(), abs=1e-4) and pairs[0].item() != 0
    weights = [p for p in PAIR.student.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, weights) for loss in pairs]
    scale = max(gradient.abs().max() for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() < 1e-3 * scale


def test_a_whole_vocabulary_makes_every_top_k_exact(rollouts, serve):
    served = ServedTeacher(serve(), PAIR.tokenizer, k=len(PAIR.tokenizer))
    first, second = losses(TopKKL(4, renormalize=False), rollouts, LOCAL, served)
    assert first.item() == pytest.approx(second.item(), abs=1e-4)


def test_spread_sums_to_one():
    packed = torch.tensor([[3.0, 5, 5, -0.2, -2, -2], [1, 0, 7, -0.5, -1.5, -9]])
    dense = spread(packed, 9)
    assert torch.allclose(dense.exp().sum(1), torch.ones(2), atol=1e-6)
    assert dense[0, 3] == pytest.approx(-0.2) and dense[1, 7] == pytest.approx(-9)
    assert dense[0, [0, 1, 2, 4, 6, 7, 8]].unique().numel() == 1


def test_only_what_is_read_is_sent(rollouts, serve):
    """No padding, one token to write, and the k that was asked for."""
    asked: list[dict] = []
    served = ServedTeacher(serve(asked=asked), PAIR.tokenizer, k=K, batch_size=3)
    asked.clear()
    pairs = served.read(rollouts, PAIR.tokenizer)
    rows = FullKL().mask(pairs).flatten().nonzero().squeeze(1)
    served.capture(pairs, {"final": pairs.teacher_rows_at(rows)})
    sent = [ids for request in asked for ids in request["prompt"]]
    whole = [[*p, *r] for p, r in zip(rollouts.prompt_ids(), rollouts.responses(), strict=True)]
    assert sent == whole and [len(request["prompt"]) for request in asked] == [3, 2]
    assert all(r["max_tokens"] == 1 and r["prompt_logprobs"] == K for r in asked)


@pytest.mark.parametrize("term", [FullKL(), Representation(), SampledTokenKL(control_variate=True)])
def test_terms_that_need_more_are_refused(term, rollouts, serve):
    served = ServedTeacher(serve(), PAIR.tokenizer, k=K)
    with pytest.raises(ValueError, match="a served teacher has its top k; use TopKTailKL"):
        losses(term, rollouts, served)
    with pytest.raises(ValueError, match="k=8: topk_tail needs 9 likeliest tokens"):
        losses(TopKTailKL(9), rollouts, served)
    with pytest.raises(ValueError, match="temperature=0.7: a served top k is that of temperature 1"):
        served.head(0.7)


def entry(change):
    """A change of the entry of the third token."""

    def changed(self, answer):
        for choice in answer["choices"]:
            entries = choice["prompt_logprobs"]
            entries[2] = change(entries[2])
        return answer

    return {"changed": changed}


def values(value):
    return entry(lambda found: {i: {"logprob": value} for i in found})


BROKEN = {
    "another model": ({"model": PAIR.student}, "nats per token from the weights it was compared with"),
    "nan": (values(float("nan")), "a log-probability is NaN or above 0"),
    "above one": (values(0.5), "a log-probability is NaN or above 0"),
    "sum above one": (values(-0.1), "sum to more than 1"),
    "words": (values("likely"), "an entry is no mapping"),
    "a list": (entry(lambda found: [1, 2]), "an entry is no mapping"),
    "null": (entry(lambda found: None), "an entry is no mapping"),
    "too few": (entry(lambda found: dict(list(found.items())[-1:])), "is not among|tokens are scored"),
    "other tokens": (
        entry(lambda found: {str(i): {"logprob": -3.5} for i in (0, 1, 2)}),
        "the server reads other tokens",
    ),
    "a larger vocabulary": (
        entry(lambda found: found | {"99999": {"logprob": -30.0}}),
        "token 99999 is not in the tokenizer",
    ),
    "too short": (
        {"changed": lambda self, a: {"choices": [c | {"prompt_logprobs": [None]} for c in a["choices"]]}},
        "scored",
    ),
    "no log-probabilities": (
        {"changed": lambda self, a: {"choices": [{"index": 0, "text": "4"}]}},
        "answers without prompt_logprobs",
    ),
    "no JSON": ({"text": lambda self, request: "<html>"}, "answered what is no JSON"),
    "deep": ({"text": lambda self, request: "[" * 100_000}, "answered what is no JSON"),
    "huge": ({"text": lambda self, request: " " * 3_000_000}, "more than the .* bytes that were expected"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_server_is_refused(name, serve):
    changes, message = BROKEN[name]
    url = serve(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        ServedTeacher(url, PAIR.tokenizer, k=K, weights=PAIR.teacher, timeout=30)
    text = str(caught.value)
    assert url in text and "\n" not in text and len(text) < 600


def test_an_error_of_the_server_is_passed_on(serve):
    class Refusing(Handler):
        def do_POST(self):
            self.send('{"error": "Requested prompt logprobs of 50,\\n greater than max allowed: 20"}', 400)

    with pytest.raises(ValueError, match="answered 400 .*greater than max allowed: 20"):
        ServedTeacher(serve(Refusing), PAIR.tokenizer, k=50)


@pytest.mark.parametrize("drips", [False, True], ids=["silent", "drips"])
def test_a_slow_server_is_given_up(drips, serve):
    """Also one that sends a little again and again, so that no single read times out."""

    class Slow(Handler):
        def do_POST(self):
            if not drips:
                time.sleep(4)
                return
            self.send_response(200)
            self.end_headers()
            for _ in range(60):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)

    began = time.monotonic()
    with pytest.raises(ValueError, match="no whole answer within 1 seconds"):
        ServedTeacher(serve(Slow), PAIR.tokenizer, k=K, timeout=1)
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    "url, message",
    [
        ("127.0.0.1:8000", "is no address"),
        ("ftp://host", "is no address"),
        ("http://127.0.0.1:9", "no answer"),
    ],
)
def test_no_server(url, message):
    with pytest.raises(ValueError, match=message):
        ServedTeacher(url, PAIR.tokenizer, timeout=2)


def test_the_model_is_named(serve):
    url = serve()
    with pytest.raises(ValueError, match=r"serves \['teacher'\]; name one of them with model="):
        ServedTeacher(url, PAIR.tokenizer, k=K, model="other")
    assert ServedTeacher(url, PAIR.tokenizer, k=K, model="teacher").server.context == 256


def test_a_run(serve, tmp_path):
    """Two steps from a served teacher end with the weights that the local one gives, within rounding."""
    ends = []
    for name in ("local", "served"):
        pair = embedded("same")
        teacher = LOCAL if name == "local" else ServedTeacher(serve(), pair.tokenizer, k=16)
        OPRDTrainer(
            model=pair.student,
            teacher=teacher,
            objective=TopKTailKL(8),
            args=short_run(tmp_path / name, max_steps=2, max_completion_length=24, learning_rate=1e-4),
            train_dataset=pair.task.train,
            processing_class=pair.tokenizer,
        ).train()
        ends.append(torch.cat([p.detach().flatten() for p in pair.student.parameters()]))
    start = torch.cat([p.detach().flatten() for p in embedded("same").student.parameters()])
    assert (ends[0] - ends[1]).norm() < 0.02 * (ends[0] - start).norm()
