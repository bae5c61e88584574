"""Prompts are encoded once, their files are those of their encoders and texts, and nothing damaged is read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import EngineError, ranks
from engine.prompt_cache import PromptCache
from engine.prompts import Prompt

PROMPTS = [Prompt(f"prompt {i}", "") for i in range(7)]
WIDTH = 5


class Encoder:
    """Tensors that tell which text, and as what, they encode; counts what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[str]]] = []

    def __call__(self, prompts: list[str], negatives: list[str]) -> dict[str, torch.Tensor]:
        self.calls.append((prompts, negatives))
        assert len(prompts) == len(negatives)
        return {
            "hidden": torch.stack([encoding(text, 1) for text in prompts]),
            "mask": torch.tensor([[len(text), 1] for text in prompts]),
            "negative_hidden": torch.stack([encoding(text, -1) for text in negatives]),
        }

    @property
    def prompts(self) -> list[str]:
        return [text for prompts, _ in self.calls for text in prompts]


def encoding(text: str, sign: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(text.encode()) + 7)
    return sign * torch.randn(3, WIDTH, generator=generator).bfloat16()


@pytest.fixture(autouse=True)
def alone():
    ranks.start(1)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


def cache_of(folder: Path, encode=None, *, key: str = "encoders", batch_size: int = 3) -> PromptCache:
    return PromptCache(folder, key, encode, batch_size)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def check(condition, prompts) -> None:
    assert set(condition) == {"hidden", "mask", "negative_hidden"}
    assert condition["hidden"].dtype == torch.bfloat16
    assert condition["mask"].dtype == torch.int64
    for row, prompt in enumerate(prompts):
        assert torch.equal(condition["hidden"][row], encoding(prompt.text, 1))
        assert torch.equal(condition["negative_hidden"][row], encoding(prompt.negative, -1))
        assert condition["mask"][row].tolist() == [len(prompt.text), 1]


def test_prompts_are_encoded_once_in_batches_and_read_in_the_order_asked(folder):
    encode = Encoder()
    cache = cache_of(folder, encode)
    cache.prepare(PROMPTS)
    assert [len(prompts) for prompts, _ in encode.calls] == [3, 3, 1]
    cache.prepare(PROMPTS[::-1])
    cache.release()
    asked = [PROMPTS[4], PROMPTS[0], PROMPTS[4]]
    check(cache.load(asked), asked)
    assert encode.prompts == [prompt.text for prompt in PROMPTS]


def test_another_process_reads_what_one_has_encoded(folder):
    cache_of(folder, Encoder()).prepare(PROMPTS)
    other = Encoder()
    check(cache_of(folder, other).load(PROMPTS), PROMPTS)
    assert other.calls == []


def test_a_negative_prompt_that_all_share_is_stored_once(folder):
    cache_of(folder, Encoder()).prepare(PROMPTS)
    assert len(files(folder)) == len(PROMPTS) + 1
    negatives = [path for path in files(folder) if "negative_hidden" in load_file(path)]
    assert len(negatives) == 1
    assert set(load_file(negatives[0])) == {"negative_hidden"}


def test_each_row_gets_its_own_negative_prompt(folder):
    rows = [Prompt("a", "x"), Prompt("b", "y"), Prompt("a", "y"), Prompt("y", "a"), Prompt("a", "x")]
    encode = Encoder()
    cache = cache_of(folder, encode)
    cache.prepare(rows)
    check(cache.load(rows), rows)
    assert len(files(folder)) == 3 + 3  # y and a are read as prompts and as negative prompts
    assert sorted(filter(None, encode.prompts)) == ["a", "b", "y"]


def test_another_negative_prompt_encodes_no_prompt_again(folder):
    cache_of(folder, Encoder()).prepare(PROMPTS)
    encode = Encoder()
    rows = [Prompt(prompt.text, "blurry") for prompt in PROMPTS]
    cache = cache_of(folder, encode)
    cache.prepare(rows)
    assert encode.calls == [([""], ["blurry"])]
    check(cache.load(rows), rows)


def test_more_prompts_encode_only_themselves(folder):
    cache_of(folder, Encoder()).prepare(PROMPTS[:5])
    encode = Encoder()
    cache_of(folder, encode).prepare(PROMPTS)
    assert encode.prompts == ["prompt 5", "prompt 6"]


def test_other_encoders_are_another_question(folder):
    cache_of(folder, Encoder()).prepare(PROMPTS)
    encode = Encoder()
    cache_of(folder, encode, key="others").prepare(PROMPTS)
    assert encode.prompts == [prompt.text for prompt in PROMPTS]
    assert len(files(folder)) == 2 * (len(PROMPTS) + 1)


def test_encoders_without_negative_prompts_leave_no_trace_of_them(folder):
    def encode(prompts, negatives):
        return {"hidden": torch.stack([encoding(text, 1) for text in prompts])}

    cache = cache_of(folder, encode)
    cache.prepare(PROMPTS)
    cache.release()
    condition = cache.load(PROMPTS)
    assert set(condition) == {"hidden"}
    assert condition["hidden"].shape == (7, 3, WIDTH)


def test_ranks_share_the_work(folder, monkeypatch):
    encoders = [Encoder() for _ in range(3)]
    rows = [*PROMPTS, Prompt("prompt 0", "x"), Prompt("prompt 0", "y")]
    for rank, encode in enumerate(encoders):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(ranks, "world_size", lambda: 3)
        cache_of(folder, encode).prepare(rows)
    parts = [{text for text in encode.prompts if text} for encode in encoders]
    assert [len(part) for part in parts] == [2, 2, 3]
    assert set.union(*parts) == {prompt.text for prompt in PROMPTS}
    cache = cache_of(folder)
    check(cache.load(rows), rows)


# ---------------------------------------------------------------------- damage


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("hello, this is not safetensors")


@pytest.mark.parametrize("damage", [cut, empty, text, Path.unlink])
def test_a_damaged_file_is_encoded_again_while_there_is_an_encoder(folder, damage):
    cache_of(folder, Encoder()).prepare(PROMPTS)
    (victim,) = [path for path in files(folder) if b"prompt 3" in path.read_bytes()]
    before = victim.read_bytes()
    damage(victim)
    encode = Encoder()
    check(cache_of(folder, encode).load(PROMPTS), PROMPTS)
    assert encode.prompts == ["prompt 3"]
    assert victim.read_bytes() == before
    damage(victim)
    encode = Encoder()
    cache_of(folder, encode).prepare(PROMPTS)
    assert encode.prompts == ["prompt 3"]
    assert victim.read_bytes() == before


@pytest.mark.parametrize("damage", [cut, empty, text, Path.unlink])
def test_without_an_encoder_a_damaged_file_is_an_error_that_names_it(folder, damage):
    cache_of(folder, Encoder()).prepare(PROMPTS[:1])
    for path in files(folder):
        damage(path)
    with pytest.raises(EngineError, match=r"\.safetensors: the encoding of 'prompt 0' is missing or damaged.*2 such"):
        cache_of(folder).load(PROMPTS[:1])


def test_what_a_killed_writer_left_is_not_read(folder):
    cache_of(folder, Encoder()).prepare(PROMPTS[:1])
    for path in files(folder):
        path.rename(path.with_suffix(".123.tmp"))
    encode = Encoder()
    check(cache_of(folder, encode).load(PROMPTS[:1]), PROMPTS[:1])
    assert encode.prompts == ["prompt 0"]


def test_an_encoding_that_is_not_finite_is_refused_and_not_written(folder):
    def overflowing(prompts, negatives):
        tensors = Encoder()(prompts, negatives)
        tensors["hidden"][0, 0] = torch.inf
        return tensors

    with pytest.raises(EngineError, match=r"encoding of 'prompt 0' is not finite \(hidden\); .* need bf16 or fp32"):
        cache_of(folder, overflowing).prepare(PROMPTS[:1])
    assert files(folder) == []
