"""What the scheduler sends to workers beside vLLM's own output of a step."""

from dataclasses import dataclass, field

from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.v1.core.sched.output import SchedulerOutput


@dataclass
class StagedSchedulerOutput(SchedulerOutput):
    """A step that encodes images of preempted requests, for model runner V1.

    vLLM sends an image's data to the workers with a new request, except where a prefix hit
    covers the image. V1 gets nothing again when a preempted request resumes (V2 gets all). So
    without this, V1 would lack the data of an image that the hit covered before the
    preemption and does not cover after it.

    Attributes:
        image_data: Request id -> index of an image -> its data, for images that the step
            encodes.
    """

    image_data: dict[str, dict[int, MultiModalKwargsItem]] = field(default_factory=dict)
