"""Sends each processed image to the engine once, and again whenever the engine has evicted it.

vLLM's engine keeps processed images. The front end mirrors the keys of that cache in a *sender
cache*, and sends an image without its data if the mirror has its key. Both sides evict by the same
rule, so they agree as long as they see the same images in the same order.

vLLM 0.32 and 0.33 update the sender cache when they render a prompt. A prompt may be rendered and
never sent (it is refused, its tokens are only counted, or its client disconnects), or be sent after
a prompt that was rendered later. Then the caches differ, and a valid request fails with status 500,
"Multi-modal cache miss". Here the sender cache is updated when the request is sent. The engine
reads requests in the order in which they are sent, so the caches agree however a request ends.

Until a prompt is sent, it has the data of all its images. The front end keeps this data in a second
cache with the same limit, as vLLM does with several API servers.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

from vllm.multimodal.cache import BaseMultiModalProcessorCache, MultiModalProcessorOnlyCache
from vllm.v1.engine.core_client import AsyncMPClient

from vitcop_vllm.adoption import adopt_with


class SendOrderCache(BaseMultiModalProcessorCache):
    """A cache of the front end whose keys change in the order of sending.

    A mixin for vLLM's own cache (``super()``), which mirrors the engine's. vLLM's renderer calls
    the methods that are overridden here; they use a second cache, of processed images with data.
    """

    _rendered: MultiModalProcessorOnlyCache
    _held: dict[str, Any]

    @classmethod
    def adopt(cls, cache: Any, model_config: Any) -> Self:
        """Turn ``cache``, which vLLM built, into an instance of this class and of its own."""
        adopted: Self = adopt_with(cache, cls)
        adopted._rendered = MultiModalProcessorOnlyCache(model_config)
        adopted._held = {}
        return adopted

    def features_to_send(self, features: Sequence[Any]) -> list[Any]:
        """The images of a request, without data of images that the engine will have cached.

        Call it right before the request is sent, in the order of sending. The calls are those of
        vLLM's receiver (``get_and_update_features``), in the same order.

        Args:
            features: vLLM's ``MultiModalFeatureSpec``, with data. They are not modified.
        """
        keys = [feature.mm_hash or feature.identifier for feature in features]
        for key in keys:
            super().touch_sender_cache_item(key)
        sent = []
        for key, feature in zip(keys, features, strict=True):
            data, _ = super().get_and_update_item((feature.data, ()), key)
            sent.append(replace(feature, data=data))
        super().release_sender_touches()
        return sent

    def is_cached_item(self, mm_hash: str) -> bool:
        return self._rendered.is_cached_item(mm_hash)

    def touch_sender_cache_item(self, mm_hash: str) -> None:
        # vLLM moves the cached images of a prompt to the end of the LRU order, and asserts later
        # that its new images have evicted none of them. Images in _held cannot be evicted.
        if self._rendered.is_cached_item(mm_hash):
            self._held[mm_hash] = self._rendered.get_and_update_item(None, mm_hash)

    def get_and_update_item(self, mm_item: Any, mm_hash: str) -> Any:
        held = self._held.get(mm_hash)
        return held or self._rendered.get_and_update_item(mm_item, mm_hash)

    def release_sender_touches(self) -> None:
        self._held.clear()

    def make_stats(self, *, delta: bool = False) -> Any:
        return self._rendered.make_stats(delta=delta)

    def clear_cache(self) -> None:
        self._rendered.clear_cache()
        super().clear_cache()


class SendOrderClient(AsyncMPClient):
    """vLLM's engine client; it sends no data of images that the engine has cached."""

    _images: SendOrderCache

    @classmethod
    def adopt(cls, client: Any, images: SendOrderCache) -> None:
        """Turn ``client``, which vLLM built, into an instance of this class and of its own."""
        adopt_with(client, cls)._images = images

    async def add_request_async(self, request: Any) -> None:
        # No await between this line and the send: two requests cannot swap their order.
        if request.mm_features:
            request.mm_features = self._images.features_to_send(request.mm_features)
        await super().add_request_async(request)


def keep_caches_equal(engine_client: Any) -> None:
    """Keep the image caches of front end and engine equal, however requests end.

    Args:
        engine_client: vLLM's ``AsyncLLM``, before its first request.
    """
    cache = engine_client.renderer.mm_processor_cache
    if cache is None:  # --mm-processor-cache-gb 0
        return
    # With several API servers or several engines, vLLM sends all data and no engine caches it.
    is_mirror = not isinstance(cache, MultiModalProcessorOnlyCache)
    images = SendOrderCache.adopt(cache, engine_client.vllm_config.model_config)
    if is_mirror:
        SendOrderClient.adopt(engine_client.engine_core, images)
