"""A reward that another process computes: batches of pictures are posted to a URL (the protocol: docs/rewards.md)."""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from torch import Tensor

from .contract import Asked, Reward, RewardError
from .pictures import encoded, pictures
from .settings import EndpointSettings

PASSING_STATUS = (408, 429)  # besides those from 500 on: reasons that another attempt may not meet


def endpoint_reward(settings: EndpointSettings, *, name: str) -> Reward:
    """The scores that a server gives.

    Args:
        settings: where and how.
        name: of the term, for errors.

    Returns:
        The reward. It raises RewardError with the URL where no attempt succeeds or the reply is not understood.
    """

    def reward(images: Tensor, targets: Tensor, asked: Asked) -> Tensor:
        scores = []
        group = len(images) // len(targets)
        shown = _files(targets) if settings.targets else []
        for start in range(0, len(images), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            request: dict[str, Any] = {"images": _files(images[part])}
            if settings.targets:
                request["targets"] = [shown[row // group] for row in range(len(images))[part]]
            if "prompt" in asked:
                request["prompts"] = list(asked["prompt"][part])
            if "class_labels" in asked:
                request["class_labels"] = asked["class_labels"][part].tolist()
            scores += _scores(_post(request, settings, name), len(request["images"]), settings, name)
        return images.new_tensor(scores)

    return reward


def _files(images: Tensor) -> list[str]:
    files = (encoded(picture, format="PNG", compress_level=1) for picture in pictures(images))
    return [base64.b64encode(file).decode() for file in files]


def _post(request: dict[str, Any], settings: EndpointSettings, name: str) -> bytes:
    body = json.dumps(request).encode()
    for attempt in range(settings.retries + 1):
        if attempt:
            time.sleep(settings.backoff * 2 ** (attempt - 1))
        message = urllib.request.Request(settings.url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(message, timeout=settings.timeout) as reply:
                return reply.read()
        except urllib.error.HTTPError as error:
            failure = f"HTTP status {error.code} {error.reason}{_said(error)}"
            if error.code < 500 and error.code not in PASSING_STATUS:
                raise _failed(settings, name, failure) from None
        except TimeoutError:
            failure = f"no reply within {settings.timeout:g} s"
        except urllib.error.URLError as error:
            timed_out = isinstance(error.reason, TimeoutError)
            failure = f"no reply within {settings.timeout:g} s" if timed_out else str(error.reason)
        except (OSError, http.client.HTTPException) as error:
            failure = f"{type(error).__name__}: {error}"
    raise _failed(settings, name, f"{settings.retries + 1} attempts failed, the last with {failure}; is it running?")


def _said(error: urllib.error.HTTPError) -> str:
    try:
        said = error.read(200).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return ""
    return f" ({said})" if said else ""


def _scores(reply: bytes, count: int, settings: EndpointSettings, name: str) -> list[float]:
    try:
        scores = json.loads(reply)["rewards"]
    except (ValueError, KeyError, TypeError):
        start = reply[:200].decode(errors="replace")
        raise _failed(settings, name, f'the reply is not JSON {{"rewards": [...]}}: {start!r}') from None
    if not isinstance(scores, list) or len(scores) != count:
        given = f"{len(scores)}" if isinstance(scores, list) else f"{scores!r}"
        raise _failed(settings, name, f"{count} rewards are needed, one an image, the reply has {given}")
    if not all(isinstance(score, (int, float)) for score in scores):
        raise _failed(settings, name, "rewards must be numbers")
    return scores


def _failed(settings: EndpointSettings, name: str, failure: str) -> RewardError:
    return RewardError(f"reward.terms.{name}.url={settings.url}: {failure}")
