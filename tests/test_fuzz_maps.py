"""A seeded corpus of damaged bridges, moments and rollouts: each is read, or refused in one line."""

import json
import random

import pytest
import torch
from fuzzing import FOREIGN, Case, check_none, damaged_bytes, flaw, reader_flaw
from safetensors import safe_open
from safetensors.torch import save

from oprd_nb.bridge import fit_bridge
from oprd_nb.bridge.readout import load_bridge
from oprd_nb.core import Rollouts
from oprd_nb.models.pairs import embedded
from oprd_nb.rollouts import HFSampler
from oprd_nb.structure.moments import Moments
from oprd_nb.teachers import Teacher


class Stored:
    """Good files of each kind, and the models they were made of."""

    def __init__(self, folder):
        self.pair = embedded("cross_architecture")
        self.teacher = Teacher(self.pair.teacher, self.pair.teacher_tokenizer)
        sampler = HFSampler(self.pair.student, self.pair.tokenizer)
        self.rollouts = sampler.sample(self.pair.task.train["prompt"][:24], max_new_tokens=16, seed=0)
        made = fit_bridge(self.pair.student, self.teacher, self.rollouts, self.pair.tokenizer)
        moments = Moments([(1, 1), (2, 3)], 4, 5)
        generator = torch.Generator().manual_seed(0)
        for pair in moments.layer_pairs:
            states = torch.randn(20, 9, generator=generator)
            moments.update(pair, states[:, :4], states[:, 4:])
        self.files = {
            "bridge": made.save(folder / "bridge.safetensors"),
            "moments": moments.save(folder / "moments.safetensors"),
            "rollouts": self.rollouts.save(folder / "rollouts.safetensors"),
        }

    def use(self, kind, path):
        """Read the file, and what is asked of it before it is used."""
        if kind == "bridge":
            load_bridge(path).check(self.pair.student, self.teacher, self.pair.tokenizer)
        elif kind == "moments":
            Moments.load(path)
        else:
            Rollouts.load(path)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return Stored(tmp_path_factory.mktemp("good"))


def contents(path):
    """Metadata and tensors of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def corpus(kind, path, rng):
    """Every case of one kind of file."""
    metadata, tensors = contents(path)
    cases = [*damaged_bytes(path.name, path.read_bytes(), rng)]

    def add(name, metadata, tensors, refused=True):
        cases.append(Case(f"{kind}: {name}", path.name, save(tensors, metadata), refused))

    for key in metadata:
        add(f"without {key}", {name: metadata[name] for name in metadata if name != key}, tensors)
        for text in ("", "nope", "[", "{}", "[]", "null", "7", '{"a":' * 100_000):
            refused = None if kind == "rollouts" else True
            add(f"{key} {text[:9]}", metadata | {key: text}, tensors, refused)
    first = next(iter(tensors))
    dtype = tensors[first].dtype
    add("no tensors", metadata, {})
    add("one missing", metadata, {name: tensors[name] for name in tensors if name != first})
    add("one too many", metadata, tensors | {"extra": torch.zeros(2)}, None)
    for name, tensor in {
        "of another shape": torch.zeros(2, 3, 4),
        "empty": torch.zeros(0),
        "one number": torch.tensor(1.0),
        "transposed": tensors[first].movedim(0, -1)[..., :1].contiguous(),
        "in words": torch.zeros(tensors[first].shape, dtype=torch.uint8),
    }.items():
        refused = None if name == "in words" else True
        add(f"tensor {name}", metadata, tensors | {first: tensor.to(dtype) if refused else tensor}, refused)
    if dtype.is_floating_point:
        for value in (float("nan"), float("inf")):
            add(f"tensor {value}", metadata, tensors | {first: torch.full_like(tensors[first], value)})
    if "header" in metadata:
        header = json.loads(metadata["header"])
        for key in header:
            for value in rng.sample([value for value in FOREIGN if value != "\ud800"], 8):
                changed = metadata | {"header": json.dumps(header | {key: value})}
                add(f"{key} {str(value)[:12]}", changed, tensors, None)
            rest = {name: header[name] for name in header if name != key}
            add(f"header without {key}", metadata | {"header": json.dumps(rest)}, tensors, None)
    if kind == "bridge":
        for side in ("student", "teacher"):
            for key in header[side]:
                for value in rng.sample([value for value in FOREIGN if value != "\ud800"], 4):
                    spec = {side: header[side] | {key: value}}
                    add(
                        f"{side} {key} {str(value)[:12]}",
                        metadata | {"header": json.dumps(header | spec)},
                        tensors,
                        None,
                    )
    rng.shuffle(cases)
    return cases


@pytest.mark.parametrize("kind", ["bridge", "moments", "rollouts"])
def test_damaged_files(kind, stored, tmp_path):
    cases = corpus(kind, stored.files[kind], random.Random(kind))
    wrong = []
    for case in cases:
        case.write(tmp_path)
        path = tmp_path / case.file
        named = "" if kind == "bridge" and case.refused is None else path.name
        found = reader_flaw(lambda path=path: stored.use(kind, path), named, case.refused)
        if found:
            wrong.append((case.name, found))
    assert len(cases) >= 30
    check_none(wrong)


def test_a_bridge_whose_maps_match_no_position(stored, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    metadata, tensors = contents(stored.files["bridge"])
    header = json.loads(metadata["header"])
    changes = {
        "other models": {"student": header["student"] | {"width": 97}},
        "layers that are not there": {"layer_pairs": [[9, 9], *header["layer_pairs"][1:]]},
        "offsets that never occur": {"offsets": [4000]},
    }
    wrong = []
    train = ["train", "embedded/student", "embedded/teacher_wide", "arithmetic", "--output_dir"]
    settings = ["--method", "bridge", "--max_steps", "12", "--max_completion_length", "8", "--use_cpu"]
    settings += ["--gradient_accumulation_steps", "1"]
    for number, (name, change) in enumerate(changes.items()):
        path = tmp_path / "bridge.safetensors"
        path.write_bytes(save(tensors, metadata | {"header": json.dumps(header | change)}))
        # The last one trains for ten steps before nothing to supervise ends it.
        found = flaw([*train, name, *settings, "--bridge", str(path)], capsys, "bridge" if number < 2 else "")
        if found or (number < 2 and (tmp_path / name / "config.yaml").exists()):
            wrong.append((name, found))
    check_none(wrong)
