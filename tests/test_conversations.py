"""Turn after turn over compressed history: the real server against the independent decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.simulator.conversation import Conversation
from bench.simulator.oracle import Oracle
from bench.simulator.registry import make_policy
from bench.simulator.trace import Replay
from tests.client import Answer, Ask, recorded_rounds, send, send_all, simulated, stagger, tokens_of
from tests.conftest import Running
from tests.setups import BUDGET, INTERVAL, SETUPS

EVERY = pytest.mark.parametrize(
    "server", [name for name in SETUPS if name.startswith("page")], indirect=True
)
OVERLAP = pytest.mark.parametrize("server", ["page1-overlap", "page4-overlap"], indirect=True)
ONE = pytest.mark.parametrize("server", ["page1-overlap"], indirect=True)
TURNS, LONG = 6, 2 * (BUDGET + INTERVAL)
RECENT = 16
POLICIES: list[dict[str, Any]] = [
    {},
    {"eviction_mode": "union", "budget": 30, "interval": 20},
    {"policy": "streaming", "budget": 21, "interval": 16},
    {"eviction_mode": "per-layer-per-head", "budget": 16, "interval": 17},
]


class Talk:
    """One conversation on the server, and the same with the oracle; `body` goes with each turn."""

    def __init__(
        self,
        server: Running,
        name: str,
        policy: dict[str, Any] | None = None,
        oracle: Oracle | None = None,
        **body: Any,
    ) -> None:
        self.server = server
        self.policy = policy or {}
        self.body = body
        self.tokens = tokens_of(f"{name}: a system prompt of its own.")
        oracle = oracle or Oracle(server.model, server.stats)
        self.oracle: Conversation = oracle.conversation(
            simulated(self.policy), server.setup.page_size
        )

    def ask(self, text: str, tokens: int = LONG, **extra: Any) -> Ask:
        temperature = 0.0 if len(self.tokens) % 2 else 1.0
        prompt = [*self.tokens, *tokens_of(text)]
        return Ask(prompt, tokens, self.policy, temperature, extra, self.body)

    def judge(self, answer: Answer, closes: tuple[int, ...] = ()) -> Replay:
        recorded = recorded_rounds(self.server.trace, answer.rid)
        # What a first prompt shares with others' is exact: computed anew, it is the same.
        cached = answer.meta["cached_tokens"] if self.oracle.length else 0
        judged = self.oracle.turn(answer.ask.prompt, answer.ids, cached, recorded, closes=closes)
        self.tokens = answer.ask.prompt + answer.ids
        return judged

    def turn(self, text: str, tokens: int = LONG) -> Answer:
        answer = send(self.server, self.ask(text, tokens))
        exact(self.judge(answer), answer)
        return answer


def exact(judged: Replay, answer: Answer) -> None:
    assert answer.error(judged.logprobs) < 1e-4
    # With overlap, a step beyond the last token is already under way when it is known.
    assert judged.surplus in (0, 1)
    if answer.ask.temperature == 0:
        assert judged.greedy.tolist() == answer.ids
    info = answer.meta["kv_policy"]
    assert info["rounds"] == len(judged.rounds) + judged.surplus


def whole_pages(server: Running, tokens: int) -> int:
    return tokens // server.setup.page_size * server.setup.page_size


def plain_part(server: Running, answer: Answer) -> int:
    """The prompt, and what fills its last page: the first tokens of the answer, never evicted."""
    return whole_pages(server, len(answer.ask.prompt) + server.setup.page_size - 1)


def history(answer: Answer) -> str:
    return answer.meta["kv_policy"]["history"]


@EVERY
def test_six_turns(server: Running) -> None:
    """Each turn goes on from what the turn before has left, and prefills only what is new."""
    page = server.setup.page_size
    talks = [Talk(server, f"{index}", policy) for index, policy in enumerate(POLICIES)]
    for turn in range(TURNS):
        left = [len(talk.tokens) for talk in talks]
        asks = [talk.ask(f" Question {turn}.", LONG + 7 * turn) for talk in talks]
        for talk, tokens, answer in zip(talks, left, send_all(server, asks), strict=True):
            evicted = talk.oracle.length - talk.oracle.physical
            exact(talk.judge(answer), answer)
            evicted += answer.meta["kv_policy"]["evicted_tokens"]
            assert talk.oracle.length - talk.oracle.physical == evicted
            assert answer.meta["kv_policy"]["evicted_tokens"] > LONG / 3
            if turn:
                assert history(answer) == "compressed"
                # The last token was computed only if another step was under way.
                missing = tokens - answer.meta["cached_tokens"]
                assert missing <= page, "more than the last, unfinished page was prefilled"
    spans = server.server.kv_policy()
    assert spans["live_spans"] >= TURNS * len(talks)
    assert spans["span_slots"] < spans["evicted_tokens"]


@OVERLAP
def test_forks_of_one_history(server: Running) -> None:
    root = Talk(server, "root")
    root.turn("Begin.")
    root.turn("Go on.")
    asks = [root.ask(f"{index} is my branch.") for index in range(3)]
    for answer in send_all(server, asks):
        branch = Talk(server, "root")
        branch.oracle = root.oracle.fork()
        exact(branch.judge(answer), answer)
        assert history(answer) == "compressed"
        assert answer.meta["cached_tokens"] >= whole_pages(server, len(root.tokens) - 1)
        branch.turn(" And then?")


@OVERLAP
@pytest.mark.parametrize("lost", [1, RECENT - 4, BUDGET])
def test_a_trimmed_answer(server: Running, lost: int) -> None:
    """A stop string that was cut off costs the tokens behind it; inside a span, the answer."""
    talk = Talk(server, f"lost {lost}")
    before = stagger(server, talk.ask("Begin.").prompt)
    first = talk.turn("Begin.", LONG + BUDGET + 1 - before)  # The last round is one token ago.
    del talk.tokens[-lost:]
    answer = talk.turn("? Something else.")
    kept = len(talk.tokens) - len(answer.ids) - len(tokens_of("? Something else."))
    if lost < RECENT:
        assert answer.meta["cached_tokens"] == whole_pages(server, kept)
        assert history(answer) == "compressed"
    else:
        assert answer.meta["cached_tokens"] == plain_part(server, first)
        assert history(answer) == "exact"


@OVERLAP
def test_nobody_else_reads_it(server: Running) -> None:
    """Another salt, another budget, no policy: they get what stock SGLang would give them."""
    talk = Talk(server, "private")
    first = talk.turn("Begin.")
    prompt = [*talk.tokens, *tokens_of(" Next.")]
    plain = plain_part(server, first)
    for policy in ({"budget": BUDGET + 4}, {"eviction_mode": "union"}, {"reuse": "prompt"}):
        answer = send(server, Ask(prompt, 4, policy))
        assert history(answer) == "exact", policy
        # The first of them has left the whole prompt in the tree, uncompressed.
        assert answer.meta["cached_tokens"] in (plain, whole_pages(server, len(prompt) - 1))
    none = send(server, Ask(prompt, 4, {"policy": "none"}))
    assert "kv_policy" not in none.meta
    other = server.server.generate(
        input_ids=prompt, sampling_params={"max_new_tokens": 4}, extra_key="salt"
    )
    assert other["meta_info"]["cached_tokens"] == 0
    assert other["meta_info"]["kv_policy"]["history"] == "exact"
    one_off = prompt[:]
    one_off[-LONG] ^= 1
    assert history(send(server, Ask(one_off, 4))) == "exact"
    assert history(send(server, Ask(prompt, 4))) == "compressed"


@OVERLAP
def test_salted_history_stays_apart(server: Running) -> None:
    """The same conversation under two salts: neither sees anything of the other's."""
    begin = tokens_of("The same words under different salts.")
    for salt in ("a", "b"):
        first = salted(server, begin, salt)
        assert (first["cached_tokens"], first["kv_policy"]["history"]) == (0, "exact")
        second = salted(server, [*begin, *first["output_ids"], *tokens_of(" Next.")], salt)
        assert second["cached_tokens"] > len(begin)
        assert second["kv_policy"]["history"] == "compressed"


def salted(server: Running, ids: list[int], salt: str) -> dict[str, Any]:
    params = {"max_new_tokens": LONG, "ignore_eos": True, "temperature": 0}
    answer = server.server.generate(input_ids=ids, sampling_params=params, extra_key=salt)
    return {**answer["meta_info"], "output_ids": answer["output_ids"]}


@ONE
def test_sessions(server: Running) -> None:
    """SGLang puts the turns of a session together: the history is found as if it was sent."""
    begin = tokens_of("A session that the server keeps.")
    session = server.server.post("/open_session", capacity_of_str_len=10000).json()
    params = {"max_new_tokens": LONG, "ignore_eos": True, "temperature": 0}
    rid = None
    for turn, ids in enumerate((begin, tokens_of(" Next."), tokens_of(" And next."))):
        answer = server.server.generate(
            input_ids=ids, sampling_params=params, session_params={"id": session, "rid": rid}
        )
        info, rid = answer["meta_info"], answer["meta_info"]["id"]
        assert info["kv_policy"]["history"] == ("compressed" if turn else "exact")
        assert info["cached_tokens"] >= turn * LONG


@OVERLAP
def test_prompt_logprobs_are_of_the_whole_prompt(server: Running) -> None:
    """They need every prompt token computed: no compressed history for that request."""
    talk = Talk(server, "logprobs")
    talk.turn("Begin.")
    prompt = [*talk.tokens, *tokens_of(" Next.")]
    params = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    body = server.server.generate(
        input_ids=prompt, sampling_params=params, return_logprob=True, logprob_start_len=0
    )
    info = body["meta_info"]
    assert info["cached_tokens"] == 0
    assert info["kv_policy"]["history"] == "exact"
    theirs = [logprob for logprob, _, _ in info["input_token_logprobs"][1:]]
    oracle = Oracle(server.model, server.stats)
    judged = oracle.replay(prompt[:1], prompt[1:] + body["output_ids"], make_policy("none"))
    ours = judged.logprobs[: len(prompt) - 1]
    assert np.abs(ours - theirs).max() < 1e-4


@OVERLAP
def test_the_end_of_thinking_closes_a_span(server: Running) -> None:
    """An answer that is told differently does not cost the reasoning before it."""
    talk = Talk(server, "thinking")
    mark, reasoning, answered = "</think>", LONG, LONG
    regex = f"[a-z ]{{{reasoning}}}{mark}[a-z ]{{{answered}}}"
    total = reasoning + len(mark) + answered
    thought = send(server, talk.ask("Think!", total, regex=regex))
    # Log-probabilities are those under the grammar; the rounds are compared one by one.
    judged = talk.judge(thought, closes=(reasoning + len(mark),))
    assert len({int(done.kept.min()) for done in judged.rounds}) > 1, "two regions"
    resident = thought.meta["kv_policy"]["resident_slots"] - len(thought.ask.prompt)
    assert BUDGET + INTERVAL < resident <= 2 * (BUDGET + INTERVAL + server.setup.page_size)

    end_of_thinking = len(thought.ask.prompt) + reasoning + len(mark)
    retold = Talk(server, "thinking")
    retold.oracle = talk.oracle.fork()
    retold.tokens = talk.tokens[: end_of_thinking + 3]
    answer = retold.turn("but now something else.")
    assert history(answer) == "compressed"
    assert whole_pages(server, end_of_thinking) <= answer.meta["cached_tokens"]
    assert answer.meta["cached_tokens"] <= end_of_thinking + 3
    assert history(talk.turn(" Next.")) == "compressed"


@ONE
@pytest.mark.parametrize("token", [-1, 264, 1 << 40, (1 << 40) + (1 << 24)])
def test_tokens_outside_the_vocabulary(server: Running, token: int) -> None:
    """Whatever the entry point: 400, and the server goes on."""
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/generate", {"input_ids": [65, token, 66], "sampling_params": {"max_new_tokens": 2}}),
        ("/generate", {"input_ids": [[65], [token]], "sampling_params": {"max_new_tokens": 2}}),
        ("/v1/completions", {"model": "tiny", "prompt": [65, token], "max_tokens": 2}),
    ]
    for path, body in bodies:
        response = server.server.post(path, **body)
        assert response.status_code == 400, path
        assert f"token {token} at position" in response.text
    assert send(server, Ask([65, 66], 2)).ids


@ONE
def test_weights_change(server: Running) -> None:
    """Nothing goes on from what other weights have computed, flushed or not."""
    talk = Talk(server, "weights")
    talk.turn("Begin.")
    assert server.server.kv_policy()["live_spans"] > 0
    response = server.server.post(
        "/update_weights_from_disk", model_path=str(server.model), flush_cache=False
    )
    assert response.json()["success"], response.text
    assert server.server.kv_policy()["live_spans"] == 0
    assert history(talk.turn(" Next.", 4)) == "exact"
    server.server.flush_cache()


@ONE
def test_counters(server: Running) -> None:
    talk = Talk(server, "counted")
    before = server.server.kv_policy()
    talk.turn("Begin.")
    talk.turn(" Next.")
    after = server.server.kv_policy()
    changed = {key: after[key] - before[key] for key in ("alias_lookups", "alias_hits")}
    assert changed == {"alias_lookups": 2, "alias_hits": 1}
    assert after["live_spans"] == before["live_spans"] + 2
    assert after["span_slots"] == before["span_slots"] + 2 * (BUDGET - RECENT)
    assert server.server.flush_cache()
    flushed = server.server.kv_policy()
    assert flushed["live_spans"] == flushed["span_slots"] == 0


NEVER = {"budget": 4096}


def exact_talks(server: Running, policy: dict[str, Any]) -> list[object]:
    """Three conversations that are never compressed, each beside one that is, where one can be."""
    server.server.flush_cache()
    seen: list[object] = []
    beginnings = [tokens_of(f"Exact {index}: the same beginning.") for index in range(3)]
    histories, others = beginnings[:], beginnings[:]
    for turn in range(3):
        for index in range(3):
            prompt = [*others[index], *tokens_of(f" Other turn {turn}.")]
            other = send(server, Ask(prompt, LONG))
            assert not policy or history(other) == ("compressed" if turn else "exact")
            others[index] = prompt + other.ids
            prompt = [*histories[index], *tokens_of(f" Turn {turn}.")]
            answer = send(server, Ask(prompt, 40 + 30 * index, policy))
            histories[index] = prompt + answer.ids
            seen.append((answer.ids, answer.logprobs.tolist(), answer.meta["cached_tokens"]))
    return seen


@pytest.mark.parametrize("server", ["stock"], indirect=True)
def test_stock_conversations(server: Running, stock_answers: dict[str, object]) -> None:
    """SGLang without the plugin; recorded for the next test."""
    stock_answers["conversations"] = exact_talks(server, {})


@ONE
def test_beside_compressed_traffic(server: Running, stock_answers: dict[str, object]) -> None:
    """Half the traffic is compressed; the other half gets what stock SGLang gives, bit for bit."""
    assert exact_talks(server, NEVER) == stock_answers["conversations"]
