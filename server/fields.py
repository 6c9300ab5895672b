"""Body fields that are the server's to fill, not the client's."""

from collections.abc import Mapping

from server.errors import RequestError
from vitcop_vllm.pruning.settings import RATIO_HEADER, RATIO_KEY

PROCESSOR_FIELDS = ("mm_processor_kwargs", "media_io_kwargs")
"""Keywords of vLLM's picture loading and processing.

``--trust-request-mm-kwargs`` must be on for the ratio to pass, and would let any client set
the rest: picture sizes, frame counts, decoders.
"""


def refuse_processor_fields(body: Mapping[str, object]) -> None:
    """Refuse a client that sets picture processing itself.

    Raises:
        RequestError: If one of ``PROCESSOR_FIELDS`` is there and not ``null``.
    """
    for field in PROCESSOR_FIELDS:
        if body.get(field) is not None:
            raise RequestError(
                f"{field} is not accepted from clients; to choose how many visual tokens are "
                f"removed send header {RATIO_HEADER} or body field {RATIO_KEY}",
                param=field,
            )
