"""The engine has every image that the front end leaves out, however requests end.

Hypothesis drives vLLM's caches of both sides, its merging of processed images and its encoding of
requests. No engine runs; a call replaces its use of the cache.
"""

import asyncio
import os
from collections import deque
from copy import copy
from itertools import count
from multiprocessing import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.envs as envs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.model_executor.models.llava import LlavaMultiModalProcessor
from vllm.multimodal.cache import (
    LruKeyReplicatedReceiverCache,
    LruKeyReplicatedSenderCache,
    MultiModalProcessorOnlyCache,
    ShmObjectStoreReceiverCache,
    ShmObjectStoreSenderCache,
)
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.utils.mem_constants import GiB_bytes, MiB_bytes
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vitcop_server.image_cache import keep_caches_equal

ROOM = 40_000
SIZES = [6_000, 9_000, 9_000, 13_000, 13_000, 21_000, 41_000]
"""Bytes of processed images, and of the cache. Some images fit; the last is too large alone."""

BUFFER_NAME = "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME"

prompts = st.lists(st.integers(0, len(SIZES) - 1), min_size=1, max_size=5)


def config() -> SimpleNamespace:
    multimodal = SimpleNamespace(
        mm_processor_cache_gb=ROOM / GiB_bytes,
        mm_shm_cache_max_object_size_mb=30_000 / MiB_bytes,
    )
    return SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1),
        model_config=SimpleNamespace(get_multimodal_config=lambda: multimodal),
    )


def processed(image: int) -> MultiModalKwargsItem:
    pixels = torch.full((SIZES[image],), image, dtype=torch.uint8)
    element = MultiModalFieldElem(data=pixels, field=MultiModalBatchedField())
    return MultiModalKwargsItem({"pixel_values": element})


def image_of(item: MultiModalKwargsItem) -> int:
    pixels = item["pixel_values"].data
    assert isinstance(pixels, torch.Tensor)
    assert (pixels == pixels[0]).all()
    assert pixels.numel() == SIZES[pixels[0]]
    return int(pixels[0])


class Client(AsyncMPClient):
    """vLLM's client, with a queue instead of its socket."""

    client_index = 0

    def __init__(self) -> None:
        self.encoder = MsgpackEncoder()
        self.wire: deque[list[bytes]] = deque()

    async def _sent(self) -> None:
        pass

    def _send_input(self, request_type: Any, request: Any, engine: Any = None) -> Any:
        self.wire.append([bytes(frame) for frame in self.encoder.encode(request)])
        return self._sent()

    def _ensure_output_queue_task(self) -> None:
        pass


class Traffic(RuleBasedStateMachine):
    """Renders requests, and sends them, refuses them and reads them in any order."""

    def __init__(self) -> None:
        super().__init__()
        vllm_config = config()
        self.connect(vllm_config)
        self.client = Client()
        keep_caches_equal(
            SimpleNamespace(
                renderer=SimpleNamespace(mm_processor_cache=self.sender),
                engine_core=self.client,
                vllm_config=vllm_config,
            )
        )
        self.decoder = MsgpackDecoder(EngineCoreRequest)
        self.processor = LlavaMultiModalProcessor.__new__(LlavaMultiModalProcessor)
        self.rendered: list[EngineCoreRequest] = []

    def connect(self, vllm_config: Any) -> None:
        self.sender = LruKeyReplicatedSenderCache(vllm_config.model_config)
        self.receiver = LruKeyReplicatedReceiverCache(vllm_config.model_config)

    @rule(images=prompts)
    def render(self, images: list[int]) -> None:
        """Like vLLM's ``_cached_apply_hf_processor``."""
        names = [f"image {image}" for image in images]
        is_cached = self.sender.is_cached(names)
        missing = [
            processed(image) for image, cached in zip(images, is_cached, strict=True) if not cached
        ]
        try:
            merged, _ = self.processor._merge_mm_kwargs(
                self.sender,
                mm_hashes={"image": names},
                mm_is_cached={"image": is_cached},
                mm_missing_kwargs={"image": missing},
                mm_missing_prompt_updates={"image": [[] for _ in missing]},
            )
        finally:
            self.sender.release_sender_touches()
        features = [
            MultiModalFeatureSpec(item, "image", name, PlaceholderRange(offset=0, length=1))
            for name, item in zip(names, merged["image"], strict=True)
        ]
        self.rendered.append(
            EngineCoreRequest("r", [0], features, None, None, 0.0, None, None, None)
        )

    @precondition(lambda self: self.rendered)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        """Drop a rendered request: refused, only counted, disconnected, or queue full."""
        self.rendered.pop(data.draw(st.integers(0, len(self.rendered) - 1)))

    @precondition(lambda self: self.rendered)
    @rule(data=st.data(), answers=st.integers(1, 3))
    def send(self, data: st.DataObject, answers: int) -> None:
        """Send a request once per answer, like vLLM."""
        request = self.rendered.pop(data.draw(st.integers(0, len(self.rendered) - 1)))
        for sent in [*(copy(request) for _ in range(answers - 1)), request]:
            asyncio.run(self.client.add_request_async(sent))

    @precondition(lambda self: self.client.wire)
    @rule()
    def read(self) -> None:
        request = self.decoder.decode(self.client.wire.popleft())
        features = self.receiver.get_and_update_features(request.mm_features)
        for feature in features:
            assert f"image {image_of(feature.data)}" == feature.identifier

    def teardown(self) -> None:
        while self.client.wire:
            self.read()


class SharedMemoryTraffic(Traffic):
    """The worker reads images from memory shared with the front end."""

    numbers = count()

    def connect(self, vllm_config: Any) -> None:
        # A new name each time: an old buffer removes its name when it is collected. An engine in
        # this process made vLLM cache its environment, so the attribute is set.
        setattr(envs, BUFFER_NAME, f"vitcop-test-{os.getpid()}-{next(self.numbers)}")
        self.sender = ShmObjectStoreSenderCache(vllm_config)
        self.receiver = ShmObjectStoreReceiverCache(vllm_config, Lock())

    def teardown(self) -> None:
        super().teardown()
        self.sender.close()


def run(traffic: type[Traffic], examples: int, steps: int = 40) -> None:
    run_state_machine_as_test(
        traffic,
        settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None),
    )


@pytest.mark.slow
def test_the_engine_never_lacks_an_image() -> None:
    run(Traffic, 50)


@pytest.mark.slow
def test_a_worker_with_shared_memory_never_lacks_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, BUFFER_NAME, "", raising=False)
    run(SharedMemoryTraffic, 50)


def test_cached_images_are_sent_without_data() -> None:
    traffic = Traffic()
    for _ in range(3):
        traffic.render([0, 0, 1])
        traffic.send(SimpleNamespace(draw=lambda _: 0), 2)
    sizes = [sum(map(len, frames)) for frames in traffic.client.wire]
    assert sizes[0] > SIZES[0] + SIZES[1]
    assert max(sizes[1:]) < 1000


@pytest.mark.parametrize("cache", [None, MultiModalProcessorOnlyCache(config().model_config)])
def test_without_a_cache_in_the_engine_all_data_is_sent(cache: Any) -> None:
    client = Client()
    keep_caches_equal(
        SimpleNamespace(
            renderer=SimpleNamespace(mm_processor_cache=cache),
            engine_core=client,
            vllm_config=config(),
        )
    )
    assert type(client) is Client
