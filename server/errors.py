"""A request the client has to change, in the shape of an OpenAI error."""

from http import HTTPStatus


class RequestError(ValueError):
    """The client's fault: answered with status 400.

    Attributes:
        param: The header or body field to change.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param

    def body(self) -> dict[str, dict[str, str | int]]:
        """The JSON body, the same as vLLM's own errors have."""
        return {
            "error": {
                "message": str(self),
                "type": "BadRequestError",
                "param": self.param,
                "code": HTTPStatus.BAD_REQUEST.value,
            }
        }
