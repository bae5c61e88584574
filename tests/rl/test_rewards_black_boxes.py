"""Rewards without a gradient: file sizes, functions of the user's, and a real server on this machine."""

import base64
import io
import itertools
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.rl.rewards import RewardError, make_reward

DOCS = Path(__file__).resolve().parents[2] / "docs" / "rewards.md"


def images_of(count, channels=3, seed=0):
    return torch.rand(count, channels, 16, 12, generator=torch.Generator().manual_seed(seed))


def score(term, images, targets=None, asked=(), name="mine"):
    reward = make_reward({name: term}, device="cpu")
    return reward(images, images if targets is None else targets, dict(asked))[1][name]


# JPEG


@pytest.mark.parametrize("quality", [95, 30])
def test_jpeg_is_the_negative_size_of_pillow_s_file_in_kilobytes(quality):
    images = torch.stack([image * scale for image, scale in zip(images_of(3), (0.0, 0.3, 1.0), strict=True)])
    sizes = []
    for image in images.numpy():
        file = io.BytesIO()
        Image.fromarray((image.transpose(1, 2, 0) * 255).round().astype("uint8")).save(file, "JPEG", quality=quality)
        sizes.append(len(file.getvalue()) / 1000)
    assert score({"kind": "jpeg", "quality": quality}, images).tolist() == pytest.approx([-size for size in sizes])
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


def test_a_grey_image_is_the_same_picture_in_three_channels():
    grey = images_of(2, channels=1)
    assert torch.equal(score({"kind": "jpeg"}, grey), score({"kind": "jpeg"}, grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("kind", [{"kind": "jpeg"}, {"kind": "http", "url": "http://127.0.0.1:9"}])
def test_an_image_that_is_not_finite_is_no_picture(kind):
    images = images_of(3)
    images[1, 0, 2, 2] = float("nan")
    with pytest.raises(RewardError, match=r"1 of 3 images hold values that are not finite"):
        score(kind, images)


def test_black_boxes_have_no_gradient_and_leave_that_of_the_others():
    images = images_of(2).requires_grad_()
    reward = make_reward({"jpeg": 1.0, "pixel": 2.0}, device="cpu")
    assert not reward.differentiable
    assert {name: term.differentiable for name, term in reward.terms.items()} == {"jpeg": False, "pixel": True}
    reward(images, images_of(1, seed=1), {})[0].sum().backward()
    alone = images.detach().requires_grad_()
    make_reward({"pixel": 2.0}, device="cpu")(alone, images_of(1, seed=1), {})[0].sum().backward()
    assert torch.equal(images.grad, alone.grad)
    assert make_reward({"jpeg": 0.0, "pixel": 1.0}, device="cpu").differentiable  # what counts for nothing is no matter


# Functions of the user's

MODULE = """
import torch
limits = (1, 2)
def brightness(images, targets, asked):
    assert images.shape == targets.shape
    return (images - targets).mean(dim=(1, 2, 3)) + torch.tensor([len(p) for p in asked["prompt"]])
def table(images, targets, asked): return images.flatten(1)
def number(images, targets, asked): return 1.0
def nan(images, targets, asked): return images.mean(dim=(1, 2, 3)) * float("nan")
def counted(images, targets, asked): return torch.arange(len(images))
def fails(images, targets, asked): raise KeyError("mine")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "needs_more.py").write_text("import not_installed_here")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("module")
def test_a_function_gets_one_target_an_image_and_what_was_asked():
    images, targets = images_of(4), images_of(2, seed=1)
    reward = make_reward({"my_rewards:brightness": 2.0}, device="cpu")
    total, terms = reward(images, targets, {"prompt": ["", "a", "bb", "ccc"]})
    gap = (images.view(2, 2, -1) - targets.view(2, 1, -1)).mean(dim=2).flatten()
    torch.testing.assert_close(terms["my_rewards:brightness"], gap + torch.arange(4))
    torch.testing.assert_close(total, 2 * terms["my_rewards:brightness"])


@pytest.mark.usefixtures("module")
def test_a_function_that_says_so_is_differentiable():
    asked = {"prompt": ["a", "b"]}
    for said in (True, False):
        images = images_of(2).requires_grad_()
        term = {"kind": "my_rewards:brightness", "differentiable": said}
        assert score(term, images, images_of(2, seed=1), asked).requires_grad == said


@pytest.mark.usefixtures("module")
def test_whole_numbers_become_fp32():
    assert score({"kind": "my_rewards:counted"}, images_of(3)).tolist() == [0.0, 1.0, 2.0]
    assert score({"kind": "my_rewards:counted"}, images_of(3)).dtype == torch.float32


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("my_rewards:table", r"the reward mine must be \(3,\), one number an image, got \(3, 576\)"),
        ("my_rewards:number", r"my_rewards:number must return a tensor \(3,\), got float"),
        ("my_rewards:nan", r"the reward mine is not finite for 3 of 3 samples"),
        ("my_rewards:brightnes", r"reward.terms.mine: my_rewards has no function 'brightnes'; did you mean 'bright"),
        ("my_rewards:limits", r"my_rewards has no function 'limits'"),
        ("no_such:f", r"reward.terms.mine: there is no module 'no_such' for no_such:f; .*PYTHONPATH"),
        ("needs_more:f", r"there is no module 'not_installed_here' for needs_more:f"),
        ("my_rewards:", r"'my_rewards:' names no function; give module:function"),
        (".my_rewards:table", r"names no function"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused(function, message):
    with pytest.raises(RewardError, match=message):
        score({"kind": function}, images_of(3))


@pytest.mark.usefixtures("module")
def test_an_error_inside_the_function_passes_as_it_is():
    with pytest.raises(KeyError, match="mine"):
        score({"kind": "my_rewards:fails"}, images_of(3))


# HTTP


@contextmanager
def serving(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # of clients that left
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def answering(monkeypatch):
    """Serves a function of (number of the request, its JSON) -> (status, body); gives the URL and the requests."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    @contextmanager
    def start(answer):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append(request | {"at": time.monotonic(), "type": self.headers["Content-Type"]})
                status, body = answer(len(requests), request)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            def log_message(self, *_):
                pass

        with serving(Handler) as url:
            yield url, requests

    return start


def picture(file):
    return np.array(Image.open(io.BytesIO(base64.b64decode(file))))


def brightness(_, request):
    return 200, {"rewards": [float(picture(image).mean() / 255) for image in request["images"]]}


def term(url, **settings):
    return {"kind": "http", "url": url, "backoff": 0.01, "timeout": 5, **settings}


def test_the_server_gets_pictures_in_batches_and_its_answers_are_the_rewards(answering):
    images = (images_of(5) * 255).round() / 255
    with answering(brightness) as (url, requests):
        rewards = score(term(url, batch_size=2), images, asked={"prompt": list("abcde"), "more": 1})
    torch.testing.assert_close(rewards, images.mean(dim=(1, 2, 3)))
    assert [request["prompts"] for request in requests] == [["a", "b"], ["c", "d"], ["e"]]
    assert {request["type"] for request in requests} == {"application/json"}
    files = [picture(file) for request in requests for file in request["images"]]
    assert np.array_equal(np.stack(files), (images * 255).round().byte().permute(0, 2, 3, 1).numpy())
    assert "targets" not in requests[0]
    assert "class_labels" not in requests[0]


def test_the_server_gets_targets_and_classes_on_demand(answering):
    images, targets = images_of(6), images_of(2, seed=1)
    with answering(brightness) as (url, requests):
        score(term(url, batch_size=4, targets=True), images, targets, {"class_labels": torch.arange(6)})
    assert [request["class_labels"] for request in requests] == [[0, 1, 2, 3], [4, 5]]
    files = [picture(file) for request in requests for file in request["targets"]]
    expected = (targets * 255).round().byte().permute(0, 2, 3, 1).repeat_interleave(3, 0)
    assert np.array_equal(np.stack(files), expected.numpy())


def test_the_server_of_the_documentation_works(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL).group(1)
    definitions, start = code.rsplit("\nThreadingHTTPServer", 1)
    assert start.endswith(".serve_forever()\n")
    names = {}
    exec(definitions, names)
    names["Scorer"].log_message = lambda *_: None
    grey = images_of(3, channels=1)
    with serving(names["Scorer"]) as url:
        rewards = score(term(url), grey)
    torch.testing.assert_close(rewards, grey.mean(dim=(1, 2, 3)), atol=0.5 / 255, rtol=0)


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_failures_that_may_pass_are_tried_again_after_growing_waits(answering, status):
    def answer(number, request):
        return brightness(number, request) if number > 2 else (status, b"busy")

    with answering(answer) as (url, requests):
        rewards = score(term(url, backoff=0.1), images_of(2))
    assert rewards.shape == (2,)
    assert len(requests) == 3
    waits = [later["at"] - earlier["at"] for earlier, later in itertools.pairwise(requests)]
    assert waits[0] >= 0.1
    assert waits[1] >= 0.2


@pytest.mark.parametrize(
    ("answer", "attempts", "message"),
    [
        (lambda *_: (503, b"no memory"), 3, r"3 attempts failed, the last with HTTP status 503 .*\(no memory\)"),
        (lambda *_: (400, b"no prompts"), 1, r"HTTP status 400 Bad Request \(no prompts\)"),
        (lambda *_: (200, b"<html>"), 1, r"the reply is not JSON .*'<html>'"),
        (lambda *_: (200, [1.0, 2.0]), 1, r"the reply is not JSON"),
        (lambda *_: (200, {"rewards": [1.0]}), 1, r"2 rewards are needed, one an image, the reply has 1"),
        (lambda *_: (200, {"rewards": 1.0}), 1, r"2 rewards are needed, one an image, the reply has 1.0"),
        (lambda *_: (200, {"rewards": [1.0, "a"]}), 1, r"rewards must be numbers"),
    ],
)
def test_failures_that_stay_end_with_the_url(answering, answer, attempts, message):
    with (
        answering(answer) as (url, requests),
        pytest.raises(RewardError, match=rf"reward\.terms\.mine\.url={url}: {message}"),
    ):
        score(term(url, retries=2), images_of(2))
    assert len(requests) == attempts


def test_rewards_that_are_not_finite_are_refused(answering):
    with (
        answering(lambda *_: (200, b'{"rewards": [NaN, 1.0]}')) as (url, _),
        pytest.raises(RewardError, match=r"the reward mine is not finite for 1 of 2"),
    ):
        score(term(url), images_of(2))


def test_a_silent_server_is_left_after_the_timeout(answering):
    def answer(*_):
        time.sleep(0.5)
        return 200, {"rewards": [0.0, 0.0]}

    with answering(answer) as (url, requests):
        started = time.monotonic()
        with pytest.raises(RewardError, match=r"2 attempts failed, the last with no reply within 0.1 s"):
            score(term(url, timeout=0.1, retries=1), images_of(2))
        assert time.monotonic() - started < 0.45
    assert len(requests) == 2


def test_a_server_that_is_not_there_is_named(answering):
    with answering(brightness) as (url, _):
        pass
    with pytest.raises(RewardError, match=rf"url={url}: 2 attempts failed, the last with .*refused.*is it running"):
        score(term(url, retries=1), images_of(2))
