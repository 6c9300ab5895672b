"""Asks conversations at ratios, once each, and counts how many agree with ratio 0."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

from vitcop_server.calibrate.agreement import (
    Agreement,
    Measure,
    Reply,
    Score,
    is_same,
    stays_likely,
)
from vitcop_server.calibrate.folder import Conversation, data_url
from vitcop_server.calibrate.server import RefusedError, Server, ServerError
from vitcop_server.calibrate.state import State, key_of

Value = TypeVar("Value", Reply, Score)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Refused:
    """A conversation that the server refuses at ratio 0, and its words."""

    conversation: Conversation
    message: str


def messages_of(one: Conversation, history: Sequence[Reply] = ()) -> list[list[Any]]:
    """The messages of each turn that the history reaches."""
    content: list[Any] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in one.images
    ]
    messages: list[Any] = []
    turns = []
    for turn, question in enumerate(one.questions[: len(history) + 1]):
        content.append({"type": "text", "text": question})
        messages.append({"role": "user", "content": content})
        turns.append(list(messages))
        if turn < len(history):
            messages.append({"role": "assistant", "content": history[turn].text})
        content = []
    return turns


class Measurement:
    """Replies and scores, from the server or from earlier runs.

    Args:
        server: The server.
        conversations: To ask. Those that the server refuses at ratio 0 are left out.
        state: Answers of earlier runs.
        facts: What answers depend on beside model, images, questions and ratio.
        concurrency: Requests at the same time.
        least: Share of its probability that each token must keep; see ``agreement``.
    """

    def __init__(
        self,
        server: Server,
        conversations: Sequence[Conversation],
        state: State,
        facts: dict[str, Any],
        concurrency: int,
        least: float,
    ) -> None:
        self.conversations = list(conversations)
        self.num_requests = 0
        self._server = server
        self._state = state
        self._facts = {"model": server.model, **facts}
        self._concurrency = concurrency
        self._least = least
        self._replies: dict[tuple[float, Conversation], list[Reply]] = {}
        self._scores: dict[tuple[float, Conversation], list[Score]] = {}

    def replies(self, ratio: float, conversation: Conversation) -> list[Reply]:
        """Replies to its turns; it must have been asked at this ratio."""
        return self._replies[ratio, conversation]

    def scores(self, ratio: float, conversation: Conversation) -> list[Score]:
        return self._scores[ratio, conversation]

    def is_measured(self, measure: Measure, ratio: float, members: Iterable[Conversation]) -> bool:
        """Whether the agreement of all members is known."""
        keys = {(ratio, one) for one in members}
        is_scored = measure == "exact" or keys <= self._scores.keys()
        return is_scored and keys <= self._replies.keys()

    def ask_baseline(self) -> list[Refused]:
        """Ask everything at ratio 0; returns what the server refuses.

        Raises:
            ServerError: If it refuses everything, or a request fails.
        """

        def ask(one: Conversation) -> Refused | None:
            try:
                self._ask(0.0, one)
            except RefusedError as error:
                return Refused(one, str(error))
            return None

        refused = [one for one in self._each(ask, self.conversations, "ratio 0") if one]
        if len(refused) == len(self.conversations):
            raise ServerError(f"the server refuses every image: {refused[0].message}")
        left_out = {one.conversation for one in refused}
        self.conversations = [one for one in self.conversations if one not in left_out]
        return refused

    def ask(self, ratio: float, members: Sequence[Conversation]) -> None:
        """Ask what was not asked yet at this ratio.

        Raises:
            ServerError: If a request fails, or the server ignores the ratio.
        """
        new = [one for one in members if (ratio, one) not in self._replies]
        if not new:
            return

        def ask(one: Conversation) -> None:
            try:
                self._ask(ratio, one)
            except RefusedError as error:
                raise ServerError(f"{one.name} at ratio {ratio:.4g}: {error}") from None

        self._each(ask, new, f"ratio {ratio:.4g}")
        if not any(reply.pruning_ratio for one in new for reply in self.replies(ratio, one)):
            raise ServerError(
                f"the server pruned nothing at ratio {ratio:.4g}: does a proxy drop the header?"
            )

    def score(self, ratio: float, members: Sequence[Conversation]) -> None:
        """Have unpruned answers scored at this ratio, where they were not yet.

        Raises:
            ServerError: If a request fails.
        """
        new = [one for one in members if (ratio, one) not in self._scores]
        self._each(lambda one: self._score(ratio, one), new, f"ratio {ratio:.4g}, log-probability")

    def unscored(self, members: Iterable[Conversation]) -> list[Conversation]:
        """Those with an answer that the server cannot score, after ``score(0, ...)``."""
        return [
            one for one in members if not all(score.logprobs for score in self.scores(0.0, one))
        ]

    def agrees(self, measure: Measure, ratio: float, one: Conversation) -> bool:
        """Whether all turns agree with ratio 0. What cannot be scored is compared exactly."""
        same = all(map(is_same, self.replies(ratio, one), self.replies(0.0, one)))
        if measure == "exact" or not ratio:
            return same
        pairs = zip(self.scores(ratio, one), self.scores(0.0, one), strict=True)
        return all(
            stays_likely(score, baseline, self._least) if baseline.logprobs else same
            for score, baseline in pairs
        )

    def agreement(
        self, measure: Measure, ratio: float, members: Sequence[Conversation]
    ) -> Agreement:
        """How many images agree; asks the server first if it must."""
        self.ask(ratio, members)
        if measure == "logprob":
            self.score(ratio, members)
        return Agreement.of((one.hashes, self.agrees(measure, ratio, one)) for one in members)

    def repeat_baseline(self, members: Sequence[Conversation]) -> int:
        """Ask some again at ratio 0; returns how many answers differ. None should."""

        def differs(one: Conversation) -> bool:
            messages = messages_of(one)[0]
            value = self._load(Reply, "again", 0.0, one, 0, lambda: self._server.ask(messages, 0.0))
            return not is_same(value, self.replies(0.0, one)[0])

        return sum(self._each(differs, members, "ratio 0 again"))

    def time_shares(self, ratio: float, members: Sequence[Conversation]) -> list[float]:
        """Times of first answers at a ratio over those at ratio 0, pair by pair.

        Requests are sent one after the other, of each pair in turns the pruned or the unpruned
        one first, and take nothing from the prefix cache.
        """

        def time(one: Conversation) -> float:
            messages = messages_of(one)[0]
            order = [0.0, ratio] if members.index(one) % 2 else [ratio, 0.0]
            seconds = {}
            for asked in order:
                ask = partial(self._server.ask, messages, asked, fresh=True)
                reply = self._load(Reply, f"time of {ratio:.6f}", asked, one, 0, ask)
                seconds[asked] = reply.seconds
            return seconds[ratio] / seconds[0.0]

        return self._each(time, members, f"time at ratio {ratio:.4g}", concurrency=1)

    def _ask(self, ratio: float, one: Conversation) -> None:
        given: list[Reply] = []
        # The history holds the unpruned answers, so each turn is compared with the same prompt.
        history = given if not ratio else self.replies(0.0, one)
        for turn in range(len(one.questions)):

            def ask(turn: int = turn) -> Reply:
                return self._server.ask(messages_of(one, history)[turn], ratio)

            texts = [reply.text for reply in history[:turn]]
            given.append(self._load(Reply, "answer", ratio, one, turn, ask, history=texts))
        self._replies[ratio, one] = given

    def _score(self, ratio: float, one: Conversation) -> None:
        replies = self.replies(0.0, one)
        baselines = self._scores.get((0.0, one))
        found = []
        for turn, reply in enumerate(replies):

            def score(turn: int = turn, reply: Reply = reply) -> Score:
                messages = messages_of(one, replies)[turn]
                if baselines is None:
                    return self._server.score_baseline(messages, reply)
                if not baselines[turn].logprobs:
                    return Score()
                return self._server.score(messages, reply, baselines[turn], ratio)

            texts = [reply.text for reply in replies[: turn + 1]]
            found.append(self._load(Score, "score", ratio, one, turn, score, history=texts))
        self._scores[ratio, one] = found

    def _load(
        self,
        kind: type[Value],
        what: str,
        ratio: float,
        one: Conversation,
        turn: int,
        ask: Callable[[], Value],
        history: Sequence[str] = (),
    ) -> Value:
        """A reply or score of an earlier run, or of the server."""
        key = key_of(
            **self._facts,
            what=what,
            ratio=f"{ratio:.6f}",
            images=one.hashes,
            questions=one.questions[: turn + 1],
            history=list(history),
        )
        if (value := self._state.get(key)) is not None:
            return kind.load(value)
        answer = ask()
        self.num_requests += 1
        notes = {"what": what, "images": one.name, "question": one.questions[turn], "ratio": ratio}
        self._state.put(key, asdict(answer), **notes)
        return answer

    def _each(
        self,
        work: Callable[[Item], Any],
        items: Sequence[Item],
        label: str,
        concurrency: int | None = None,
    ) -> list[Any]:
        """Results of ``work``, in order, of several items at a time; the first error ends it."""
        with ThreadPoolExecutor(concurrency or self._concurrency) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                bar = tqdm(as_completed(futures), label, len(items), leave=False, disable=None)
                for future in bar:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]
