"""SGLang's frontend language against a server, with every request that it sends on record."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import sglang as sgl

from bench.agent.calls import REASONING, TOOL_CALL, Call, tokenize
from bench.server import Endpoint

PATH = "frontend"
FORK, BRANCH, SELECT = "fork", "branch", "select"


@dataclass(frozen=True)
class Sent:
    """One request: the text that was sent, what came back, and when."""

    turn: int
    kind: str
    text: str
    reply: str
    info: dict[str, Any]
    first_token_s: float
    total_s: float


class RecordingEndpoint(sgl.RuntimeEndpoint):
    """The frontend's backend.

    Attributes:
        turn: set by the program, for the record.
        sent: all requests, in the order of their answers.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.turn = 0
        self.sent: list[Sent] = []

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
        """Streams, for the time of the first token; the frontend waits for the whole answer."""
        kind = BRANCH if s.fork_start_text_pos is not None else REASONING
        kind = TOOL_CALL if sampling_params.json_schema else kind
        text, pieces, began, first = s.text_, [], time.perf_counter(), 0.0
        for piece in self.generate_stream(s, sampling_params):
            first = first or time.perf_counter()
            pieces.append(piece)
        ended = time.perf_counter()
        reply, info = "".join(piece for piece, _ in pieces), pieces[-1][1]
        self.sent.append(Sent(self.turn, kind, text, reply, info, first - began, ended - began))
        return reply, info

    def commit_lazy_operations(self, s: Any) -> None:
        """Before a fork the frontend sends the common text, for the cache."""
        self._send(FORK, s, {"text": s.text_, "sampling_params": {"max_new_tokens": 0}})

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        """What `select` sends: the common text, then that with every choice behind it."""
        return self._send(SELECT, s, data)

    def _send(self, kind: str, s: Any, data: dict[str, Any]) -> Any:
        began = time.perf_counter()
        answer = super()._generate_http_request(s, data)
        seconds = time.perf_counter() - began
        one = isinstance(answer, dict)
        texts, answers = ([data["text"]], [answer]) if one else (data["text"], answer)
        for text, part in zip(texts, answers, strict=True):
            self.sent.append(Sent(self.turn, kind, text, "", part["meta_info"], seconds, seconds))
        return answer


def calls(endpoint: Endpoint, agent: int, sent: list[Sent]) -> list[Call]:
    """The record in tokens: known is what an earlier request has sent or got, as text."""
    found = []
    for position, request in enumerate(sent):
        earlier = (before.text + before.reply for before in sent[:position])
        known = max((len(text) for text in earlier if request.text.startswith(text)), default=0)
        new = len(tokenize(endpoint, prompt=request.text[known:], add_special_tokens=False))
        prompt = request.info["prompt_tokens"]
        found.append(
            Call(
                PATH,
                agent,
                request.turn,
                request.kind,
                prompt,
                request.info["cached_tokens"],
                request.info["completion_tokens"],
                prompt - new if known else 0,
                request.first_token_s,
                request.total_s,
            )
        )
    return found
