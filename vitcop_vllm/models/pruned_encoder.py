"""What every pruned model does in the encoder; a family adds its tower."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.nn.functional import pad
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.utils.torch_utils import async_tensor_h2d

from vitcop_vllm.engine.config import pruning_settings_of
from vitcop_vllm.models.columns import Columns
from vitcop_vllm.models.dummy_runs import dummy_counts
from vitcop_vllm.models.processing import (
    COUNTS_FIELD,
    VIDEO_COUNTS_FIELD,
    shape_of_row,
    video_of_row,
)
from vitcop_vllm.models.stage_one import (
    Groups,
    ImageShape,
    Kept,
    StageOne,
    VideoShape,
    ViewOf,
    gather_rows,
    group_by_shape,
    no_embeddings_yet,
)
from vitcop_vllm.models.tensor_parallel import concat_over_ranks, mean_over_ranks
from vitcop_vllm.pruning.frames import changed_tokens
from vitcop_vllm.pruning.grids import Grids
from vitcop_vllm.pruning.kernel_set import kernel_set
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.selectors import selector_of
from vitcop_vllm.pruning.views import EncoderView
from vitcop_vllm.worker.explain import PatchSelection, SelectionSink

ImageInputs = Mapping[str, torch.Tensor]
"""Fields of a batch of processed images, by name."""


class PrunedEncoder:
    """The decoder gets the tokens of an image that Stage I keeps. A mixin of vLLM's model.

    A pruned image's embeddings carry columns with what the decoder needs to know of each token;
    see ``columns``.

    Attributes:
        published_density_scale: d_c of the clustering that is published for the family.
        sink: Records what Stage I selects; ``None`` records nothing. Set while vLLM's runner
            encodes images that are to be explained: it offers no argument of
            ``embed_multimodal`` to pass the sink in.
    """

    published_density_scale: float | None = None
    sink: SelectionSink | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        this: Any = self
        text = this.config.get_text_config()
        self._set_up_stage_one(vllm_config, text.hidden_size * (1 + self.num_deepstack_levels))
        self._num_layers: int = text.num_hidden_layers
        # Whether pruned images were encoded, dummies while vLLM measured memory or real ones since.
        self._encoder_ran = False

    def _set_up_stage_one(self, vllm_config: Any, width: int) -> None:
        self._model_config = vllm_config.model_config
        self.pruning = pruning_settings_of(self._model_config.hf_config)
        self.selector = selector_of(self.pruning.selector)
        self.kernels = kernel_set(self.pruning.kernels)
        self.stage_one = StageOne(
            self.selector, self.pruning, self.kernels, self.published_density_scale
        )
        self.columns = Columns(
            width,
            labels=self.selector.clusters,
            # Where a token lies in its image decides its rotary position.
            places=self._model_config.uses_mrope,
        )
        self._encoder_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        # Of this step's rows, and how many of these are tokens of pruned images.
        self._labels: torch.Tensor | None = None
        self._num_labels = 0
        self._places: torch.Tensor | None = None

    # What a family adds.

    def slice_images(self, inputs: ImageInputs, first: int, end: int) -> ImageInputs:
        """The fields of images ``first`` to ``end - 1``."""
        raise NotImplementedError

    def frames_as_images(self, videos: ImageInputs) -> ImageInputs:
        """The fields of images that are the videos' frames; only if the model takes videos."""
        raise NotImplementedError

    def token_pixels(self, images: ImageInputs, number: int) -> torch.Tensor:
        """(V, C) pixels of each token of image ``number``; only if the model compares frames.

        In the order of the image's grid.
        """
        raise NotImplementedError

    @property
    def video_tail(self) -> torch.Tensor | None:
        """(n, H) embeddings after a video's last frame, if the model has any; its layout's tail."""
        return None

    def encode_kept(
        self, inputs: ImageInputs, groups: Groups, keep: Any
    ) -> Mapping[ImageShape, torch.Tensor]:
        """Encode images, and of the pruned ones no more than is kept.

        Args:
            inputs: Fields of the images.
            groups: Numbers of the images by shape.
            keep: Called once, with a function that makes the ``EncoderView`` of a shape's
                images, when the last layer's queries and keys are known. Returns a ``Kept``.

        Returns:
            Shape -> (B, n1, H) embeddings of its images.
        """
        raise NotImplementedError

    @property
    def num_deepstack_levels(self) -> int:
        """First decoder layers after which the model adds features of the encoder.

        An image's embeddings hold them after the embeddings proper, H columns per level.
        """
        return 0

    def prompt_order(self, grids: Grids, device: torch.device) -> torch.Tensor | None:
        """(V,) int64, number in the prompt of each token of an image.

        ``None`` if the prompt has the tokens in the order of the grids.
        """
        return None

    def view_of_layer(self, ranks: int, **fields: Any) -> EncoderView:
        """A view of the encoder's last layer, whose heads ``ranks`` tensor-parallel ranks share.

        Args:
            ranks: Number of ranks.
            fields: The other attributes of the view. They have no ``embed``: the embeddings of
                the layer's output do not exist yet.
        """
        return EncoderView(
            embed=no_embeddings_yet,
            mean_over_ranks=partial(mean_over_ranks, ranks=ranks),
            concat_over_ranks=partial(concat_over_ranks, ranks=ranks),
            kernels=self.kernels,
            **fields,
        )

    # The encoder.

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        videos: Any = kwargs.pop(VIDEO_COUNTS_FIELD, None)
        if videos is not None:
            return self._embed_videos([video_of_row(row) for row in videos.tolist()], kwargs)
        rows: Any = kwargs.pop(COUNTS_FIELD, None)
        if rows is None:  # embeddings that a client computed: of unpruned images
            embeddings = self._embed_whole(kwargs)
            self._record_none(len(embeddings))
            return embeddings
        images = [shape_of_row(row) for row in rows.tolist()]
        if not self._prunes(images):
            if not self._encoder_ran:
                self._profile_encoder(images, kwargs)
            self._record_whole(images)
            return self._embed_whole(kwargs)
        self._encoder_ran = True
        return self._embed_in_batches(kwargs, images, self.sink)

    def _embed_videos(
        self, videos: Sequence[VideoShape], kwargs: Mapping[str, Any]
    ) -> MultiModalEmbeddings:
        """Encode each frame as an image. A video's embeddings are those of its frames."""
        if self.sink is not None:
            self.sink.expect_frames([video.num_frames for video in videos])
        frames = [frame for video in videos for frame in video.frames]
        if not self._prunes(frames):
            if not self._encoder_ran:
                self._profile_encoder(frames, self.frames_as_images(kwargs))
            self._record_whole(frames)
            return self._embed_whole(kwargs)
        self._encoder_ran = True
        inputs = self.frames_as_images(kwargs)
        changed = self._changed_tokens(inputs, videos) if self.pruning.compare_frames else None
        of_frames = iter(self._embed_in_batches(inputs, frames, self.sink, changed))
        return [self._join_frames([*islice(of_frames, video.num_frames)]) for video in videos]

    def _join_frames(self, frames: list[torch.Tensor]) -> torch.Tensor:
        """A video's embeddings from those of its frames, with the columns of these."""
        if self.video_tail is not None:
            plain = self.video_tail.to(frames[0].dtype)
            # The columns of a token that belongs to no frame are never read.
            frames.append(pad(plain, (0, frames[0].shape[1] - plain.shape[1])))
        return torch.cat(frames)

    def _changed_tokens(
        self, inputs: ImageInputs, videos: Sequence[VideoShape]
    ) -> list[torch.Tensor]:
        """Of each frame (V,) bool: the tokens that show something else than the frame before."""
        changed: list[torch.Tensor] = []
        for video in videos:
            before = None
            for _ in range(video.num_frames):
                pixels = self.token_pixels(inputs, len(changed))
                changed.append(changed_tokens(before, pixels))
                before = pixels
        return changed

    def _prunes(self, images: Sequence[ImageShape]) -> bool:
        """Whether Stage I drops tokens of any of these images."""
        return self.selector.prunes_encoder and any(shape.counts.is_pruned for shape in images)

    def _record_none(self, num_images: int) -> None:
        """Report images of which Stage I selects nothing."""
        if self.sink is not None:
            self.sink.record_patches([None] * num_images)

    def _record_whole(self, images: Sequence[ImageShape]) -> None:
        """Report images that Stage I leaves whole: the order of their tokens, if it matters."""
        if self.sink is None:
            return
        selections: list[PatchSelection | None] = []
        for counts, grids in images:
            order = self.prompt_order(grids, torch.device("cpu")) if counts.is_pruned else None
            whole = None if order is None else PatchSelection(order.argsort(), None, None)
            selections.append(whole)
        self.sink.record_patches(selections)

    def _embed_whole(self, kwargs: Mapping[str, Any]) -> MultiModalEmbeddings:
        this: Any = super()
        embeddings: MultiModalEmbeddings = this.embed_multimodal(**kwargs)
        return embeddings

    def _embed_in_batches(
        self,
        kwargs: Any,
        images: Sequence[ImageShape],
        sink: SelectionSink | None,
        changed: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        return [
            embedding
            for first, end in self._batches(images)
            for embedding in self._embed_pruned(
                self.slice_images(kwargs, first, end),
                images[first:end],
                sink,
                None if changed is None else changed[first:end],
            )
        ]

    def _batches(self, images: Sequence[ImageShape]) -> list[tuple[int, int]]:
        """Ranges of images to encode at once.

        vLLM budgets the encoder by the tokens it puts out, and ours computes all patches: never
        more at once than a budget of unpruned images would let through.
        """
        batches = []
        first = tokens = 0
        for number, (counts, *_) in enumerate(images):
            if number > first and tokens + counts.encoder > self._encoder_tokens:
                batches.append((first, number))
                first, tokens = number, 0
            tokens += counts.encoder
        return [*batches, (first, len(images))]

    def _profile_encoder(self, images: Sequence[ImageShape], kwargs: Mapping[str, Any]) -> None:
        """Encode pruned images too while vLLM measures memory with unpruned dummy images."""
        self._encoder_ran = True
        if not self.selector.prunes_encoder:
            return
        pruned = []
        for unpruned, grids in images:
            counts = dummy_counts(self.pruning, self._num_layers, unpruned.encoder)
            if counts is None:
                return
            pruned.append(ImageShape(counts, grids))
        self._embed_in_batches(kwargs, pruned, None)

    def _embed_pruned(
        self,
        inputs: ImageInputs,
        images: Sequence[ImageShape],
        sink: SelectionSink | None = None,
        changed: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Encode images together, and run Stage I on those of one shape together.

        ``changed``: see ``StageOne.keep``.

        Returns:
            Per image (n1, H), with the columns of a pruned one.
        """
        groups = group_by_shape(images)
        kept: Kept = {}

        def keep(view_of: ViewOf) -> Kept:
            nonlocal kept
            kept = self.stage_one.keep(groups, view_of, changed)
            return kept

        if self.selector.reads_embeddings:
            embedded = self._embed_then_keep(inputs, groups, keep)
        else:
            embedded = self.encode_kept(inputs, groups, keep)
        embeddings: list[torch.Tensor] = [torch.empty(0)] * len(images)
        selections: list[PatchSelection | None] = [None] * len(images)
        for shape, numbers in groups.items():
            of_shape = embedded[shape]
            if (tokens := kept.get(shape)) is not None:
                of_shape = self.columns.append(of_shape, tokens.labels, tokens.index, shape.grids)
                if sink is not None:
                    for number, selection in zip(numbers, tokens.of_images(), strict=True):
                        selections[number] = selection
            for number, embedding in zip(numbers, of_shape, strict=True):
                embeddings[number] = embedding
        if sink is not None:
            sink.record_patches(selections)
        return embeddings

    def _embed_then_keep(
        self, inputs: ImageInputs, groups: Groups, keep: Any
    ) -> Mapping[ImageShape, torch.Tensor]:
        """For selectors that read embeddings: encode all, then select."""
        views: dict[ImageShape, EncoderView] = {}
        if self.selector.reads_layer:
            whole = self._embed_with_views(inputs, groups, views)
        else:
            whole = list(self._embed_whole(inputs))
        of_shape = {
            shape: torch.stack([whole[number] for number in numbers])
            for shape, numbers in groups.items()
        }

        def view_of(shape: ImageShape, numbers: Sequence[int]) -> EncoderView:
            order = self.prompt_order(shape.grids, of_shape[shape].device)
            if order is not None:
                of_shape[shape] = of_shape[shape][:, order]
            if shape in views:
                return replace(views[shape], embed=lambda: of_shape[shape])
            return EncoderView.of_embeddings(of_shape[shape], shape.grids, self.kernels, order)

        for shape, kept in keep(view_of).items():
            of_shape[shape] = gather_rows(of_shape[shape], kept.index)
        return of_shape

    def _embed_with_views(
        self, inputs: ImageInputs, groups: Groups, views: dict[ImageShape, EncoderView]
    ) -> list[torch.Tensor]:
        """Each image's embeddings, as if none were pruned; adds the layer's views to ``views``."""
        shapes = {number: shape for shape, numbers in groups.items() for number in numbers}
        plain = group_by_shape(
            [
                shape._replace(counts=VisualTokenCounts.unpruned(shape.counts.encoder))
                for _, shape in sorted(shapes.items())
            ]
        )

        def keep_all(view_of: ViewOf) -> Kept:
            views.update({shape: view_of(shape, numbers) for shape, numbers in groups.items()})
            return {}

        whole = [torch.empty(0)] * len(shapes)
        for shape, embedded in self.encode_kept(inputs, plain, keep_all).items():
            for number, embedding in zip(plain[shape], embedded, strict=True):
                whole[number] = embedding
        return whole

    # The decoder gets the embeddings.

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Runs right before forward, with the images of the same step in order of rows. vLLM's
        # Qwen2_5_VLForConditionalGeneration carries positions in the same way with EVS:
        # _postprocess_image_embeds_evs appends them, recompute_mrope_positions splits them off.
        self._labels, self._num_labels, self._places = None, 0, None
        if multimodal_embeddings is not None:
            self._num_labels = self.columns.num_tokens(multimodal_embeddings)
            multimodal_embeddings, labels, places = self.columns.split([*multimodal_embeddings])
            if labels is not None:
                assert is_multimodal is not None
                self._labels = _scatter_rows(labels[:, None], is_multimodal)[0]
            if places is not None:
                assert is_multimodal is not None
                self._places = _scatter_rows(places, is_multimodal)
        this: Any = super()
        embeddings: torch.Tensor = this.embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """vLLM's forward, with kept tokens at their places in the image."""
        self.add_places(positions)
        this: Any = super()
        return this.forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def add_places(self, positions: torch.Tensor) -> None:
        """Add the rows and columns of this step's image tokens to (3, T) rotary positions."""
        if (places := self._places) is not None:
            # In place: compiled code may read the positions where the runner keeps them. The
            # runner writes all of them again before its next step.
            positions[1:, : places.shape[1]] += places
            self._places = None


def _scatter_rows(rows: torch.Tensor, is_multimodal: torch.Tensor) -> torch.Tensor:
    """Rows of the image tokens at their places in a step.

    Args:
        rows: (N, C), of all image tokens of the step.
        is_multimodal: (T,) bool, N of them set; on the host or the device.

    Returns:
        (C, T), 0 for other tokens.
    """
    if is_multimodal.device != rows.device:
        is_multimodal = async_tensor_h2d(is_multimodal, device=rows.device)
    # No indexing by a mask: the host would wait for how many are set.
    place = is_multimodal.cumsum(0).sub_(1).clamp_(min=0)
    return rows[place].masked_fill_(~is_multimodal[:, None], 0).T
