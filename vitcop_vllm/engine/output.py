"""Data that the scheduler sends to the workers in addition to vLLM's output of a step."""

from dataclasses import dataclass, field

from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.v1.core.sched.output import SchedulerOutput


@dataclass
class StagedSchedulerOutput(SchedulerOutput):
    """A step that encodes images of preempted requests, for model runner V1.

    vLLM sends an image's data to the workers with a new request, unless a prefix cache hit covers
    the image. When a preempted request resumes, vLLM sends the data again to V2, but not to V1.
    If the hit no longer covers the image by then, V1 does not have the image's data.

    Attributes:
        image_data: Request id -> index of an image -> its data, for images that the step
            encodes.
    """

    image_data: dict[str, dict[int, MultiModalKwargsItem]] = field(default_factory=dict)
