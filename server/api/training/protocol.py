"""OpenAI's body for a new fine-tuning job. Fields that this server doesn't support are refused by name."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.generation.body import validate
from guanaco.server.api.http.errors import bad_request
from guanaco.server.api.values.base import Body, fail
from guanaco.server.training.jobs.records import Hyperparameters
from guanaco.server.training.jobs.service import JobRequest

_Name = Annotated[str, Field(min_length=1, max_length=256)]
_AUTO = "auto"
_METHODS = ("dpo", "reinforcement")


class HyperparametersBody(Body):
    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=100)] = "auto"

    def chosen(self) -> Hyperparameters:
        """The values, with None for `auto`."""
        return Hyperparameters(*(None if value == _AUTO else value for value in self.model_dump().values()))


class SupervisedBody(Body):
    hyperparameters: HyperparametersBody | None = None


class MethodBody(Body):
    type: Literal["supervised"]
    supervised: SupervisedBody | None = None


class JobBody(Body):
    """One fine-tuning job."""

    model: _Name
    training_file: _Name
    validation_file: _Name | None = None
    hyperparameters: HyperparametersBody | None = None
    method: MethodBody | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        supervised = None if self.method is None else self.method.supervised
        inner = None if supervised is None else supervised.hyperparameters
        if self.hyperparameters is not None and inner is not None and inner != self.hyperparameters:
            raise fail("hyperparameters and method.supervised.hyperparameters differ: give one of them")
        return self

    def request(self) -> JobRequest:
        """The job in the form that the training service takes."""
        supervised = None if self.method is None else self.method.supervised
        inner = None if supervised is None else supervised.hyperparameters
        chosen = self.hyperparameters or inner or HyperparametersBody()
        return JobRequest(
            self.model,
            self.training_file,
            self.validation_file,
            chosen.chosen(),
            self.suffix,
            self.seed,
            self.metadata,
        )


def read_job(data: dict[str, Any]) -> JobBody:
    """The body as a job. Raises a 400 that names the field if one is wrong, unknown or not supported."""
    if data.get("integrations"):
        raise _unsupported("integrations", "integrations are not supported: metrics are in the job's events")
    if data.get("integrations") in (None, []):
        data = {name: value for name, value in data.items() if name != "integrations"}
    method = data.get("method")
    if isinstance(method, dict):
        for name in _METHODS:
            if method.get("type") == name or method.get(name) is not None:
                raise _unsupported(f"method.{name}", f"the method {name} is not supported: use supervised")
    _check_known(data, JobBody, "")
    for path, model in (
        (("hyperparameters",), HyperparametersBody),
        (("method",), MethodBody),
        (("method", "supervised"), SupervisedBody),
        (("method", "supervised", "hyperparameters"), HyperparametersBody),
    ):
        inner: Any = data
        for part in path:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            _check_known(inner, model, ".".join(path) + ".")
    return validate(JobBody, data)


def _check_known(data: dict[str, Any], model: type[Body], prefix: str) -> None:
    known = {*model.model_fields, *(_METHODS if model is MethodBody else ())}
    for name in data.keys() - known:
        shown = prefix + name if re.fullmatch("[a-zA-Z_]{1,64}", name) else prefix + "(a field)"
        raise _unsupported(shown, f"{shown} is not a field here; there are {', '.join(model.model_fields)}")


def _unsupported(param: str, message: str) -> Exception:
    return bad_request(message, param, ErrorCode.UNSUPPORTED_PARAMETER)
